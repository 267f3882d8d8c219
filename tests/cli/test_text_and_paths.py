"""Texts that are not UTF-8, and paths that begin with ``~``, everywhere in the command line and the API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from posenc.cli._scaffold import create
from posenc.errors import InvalidInputError
from posenc.evaluate.models import locate
from posenc.evaluate.texts import read_text
from posenc.files import expanded, replacing

WORDS = "the quick brown fox jumps over the lazy dog " * 40
LATIN = "\xe9t\xe9".encode("latin-1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def generate(*arguments: object, stdin: bytes) -> tuple[int, str, str]:
    command = ["generate", "--max-new-tokens", "2", "--prompt-file", "-", *map(str, arguments)]
    result = CliRunner().invoke(group, command, input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_standard_input_that_is_not_utf8_is_refused(small_model: Path):
    assert generate("--model", small_model, stdin=LATIN) == (
        2,
        "",
        "posenc: standard input: is not UTF-8 text (byte 0). Convert it to UTF-8 and try again.\n",
    )


def test_standard_input_is_read_like_a_file(small_model: Path, tmp_path: Path):
    content = "\xe9t\xe9\r\n\u00b1\r1".encode()
    (tmp_path / "prompt").write_bytes(content)
    chosen = ("generate", "--model", str(small_model), "--max-new-tokens", "2", "--json", "--prompt-file")
    from_file = CliRunner().invoke(group, [*chosen, str(tmp_path / "prompt")])
    assert from_file.exit_code == 0, from_file.stderr
    assert generate("--model", small_model, "--json", stdin=content)[:2] == (0, from_file.stdout)
    assert read_text(tmp_path / "prompt").content == "\xe9t\xe9\n\xb1\n1"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_standard_input_is_utf8_in_any_locale(small_model: Path, encoding: str):
    command = [sys.executable, "-c", "from posenc.cli import main; main()", "generate", "--model", str(small_model)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*command, "--prompt-file", "-", "--max-new-tokens", "2", "--json"],
        input="\xe9t\xe9".encode(),
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == 5  # a byte-level tokenizer that does not know the word


def test_missing_standard_input_is_an_error(run, small_model: Path, monkeypatch: pytest.MonkeyPatch):
    from posenc.cli.generate import read_prompt

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidInputError, match="there is no standard input"):
        read_prompt(None, "-")


def test_a_prompt_of_undecodable_bytes_is_refused(run, small_model: Path):
    result = run("generate", "--model", small_model, "--prompt", os.fsdecode(b"a\xff"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--prompt: is not text in the encoding of this shell" in result.stderr


def test_extreme_sampling_options_work_or_are_refused(run, small_model: Path):
    chosen = ("generate", "--model", small_model, "--prompt", "the", "--max-new-tokens", 2, "--sample")
    assert run(*chosen, "--temperature", "1e-6", "--seed", 2**63 - 1).exit_code == 0
    assert "--temperature: below 1e-06 logits overflow" in run(*chosen, "--temperature", "1e-320").stderr
    assert run(*chosen, "--seed", 10**30).exit_code == 2


def test_every_verb_expands_a_home_folder(run, small_model: Path, home: Path):
    shutil.copytree(small_model, home / "model")
    (home / "text").write_text(WORDS)
    (home / "posenc.yaml").write_text("strategy: rope\n")
    suite = {
        "name": "s", "model": "~/model", "lengths": [64], "strategies": [{"strategy": "rope"}],
        "tasks": [{"task": "perplexity", "text": "~/text", "documents": 1, "scored": 8}],
    }  # fmt: skip
    (home / "suite.yaml").write_text(json.dumps(suite))
    sized = ("--lengths", 64, "--score", 8, "--documents", 2)
    for command in (
        ("ppl", "--model", "~/model", "--text", "~/text", "--config", "~/posenc.yaml", *sized),
        ("generate", "--model", "~/model", "--prompt-file", "~/text", "--config", "~/posenc.yaml"),
        ("eval", "~/suite.yaml", "--out", "~/results", "--bundle", "~/bundle.json"),
        ("report", "~/results", "--out", "~/pages"),
        ("plan", "rope", "--prompt", 9, "--window", 4, "--plot", "~/plan.png"),
        ("bench", "attention", "--heads", "1/1x8", "--lengths", 8, "--rounds", 1, "--no-memory", "-s", "rope",
         "--out", "~/bench"),
        ("calibrate", "~/model", "--text", "~/text", "--dry-run", *sized),
        ("new", "plugin", "of-home", "--into", "~"),
    ):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 0, (command, result.stderr)
    written = {path.name for path in home.iterdir()}
    assert {"results", "bundle.json", "pages", "plan.png", "bench", "of-home"} <= written
    assert not Path("~").exists()


def test_the_api_expands_a_home_folder(small_model: Path, home: Path):
    shutil.copytree(small_model, home / "model")
    (home / "posenc.yaml").write_text("strategy: {name: rerope, window_size: 9}\n")
    assert posenc.load_config("~/posenc.yaml").strategy.params == {"window_size": 9}
    model = posenc.from_pretrained("~/model", "~/posenc.yaml")
    assert (home / "model" / "posenc.json").is_file()
    posenc.attached(model).remove()
    with posenc.apply(model, Path("~/posenc.yaml")) as handle:
        assert handle.strategy.name == "rerope"
    assert posenc.attached(posenc.from_pretrained("~/model")) is not None
    assert locate("~/model") == str(home / "model")
    assert create("plugin", "at-home", "~")[0].is_relative_to(home)
    with replacing("~/file") as temporary:
        temporary.write_text("x")
    assert (home / "file").read_text() == "x"
    assert not Path("~").exists()


def test_the_home_of_an_unknown_user_is_one_message(run):
    assert expanded("a/~b") == Path("a/~b")
    result = run("ppl", "-s", "rope", "--text", "~no-such-user-here/text")
    assert result.exit_code == 2
    assert "~no-such-user-here/text: there is no such home folder here" in result.stderr
