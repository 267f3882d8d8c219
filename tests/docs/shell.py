"""Run a command of the documentation as it is shown, but with less text, fewer candidates and fewer rounds.

The output of a command is returned. Nothing is fetched, installed or served beyond one request, and nothing is written
outside the folder in which it runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import pytest
import yaml
from click.testing import CliRunner

from posenc.cli._group import group
from posenc.evaluate.calibrate.corpus import read_source
from posenc.evaluate.calibrate.search import Candidate, candidates
from posenc.evaluate.texts import Text
from scripts import micro
from tests.docs.collect import ROOT

SMALL = {
    "bench": "--lengths 128 --rounds 1 --seconds 0 --threads 1 --no-memory --model tiny",
    "calibrate": "--lengths 256 --documents 2",
    "demo": "--documents 2",
    "eval": "--workers 1",
    "explore": "--port 0",
    "ppl": "--documents 2",
}
"""By verb: options that make it small, added after its own; the last one counts."""

CHARACTERS = 100_000
"""Characters of a calibration text: two documents are cut from it, and tokenizing all of it takes seconds."""

SETTING = re.compile(r"[A-Z_]+=")
"""Matches a variable that is set before a command."""

FOLDERS = ("posenc", "examples", "docs", "benchmarks")
"""Folders that commands read. They are copied, because some commands write beside the files they read."""


def copy_repository(to: Path) -> None:
    """Copy the part of the repository that commands read, with suites cut to two strategies at one length."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (to / "benchmarks").glob("*.yaml"):
        if "tasks" in yaml.safe_load(file.read_text(encoding="utf-8")):  # the others are calibrations
            cut(file)


def cut(suite: Path) -> None:
    """Make a suite small; it is still read by the real reader, and measured."""
    data = yaml.safe_load(suite.read_text(encoding="utf-8"))
    tasks = [task if isinstance(task, dict) else {"task": task} for task in data["tasks"]]
    data |= {"lengths": data["lengths"][:1], "strategies": data["strategies"][:2]}
    data["tasks"] = [{**task, "documents": 2} for task in tasks]
    if data.get("model") == "smollm2":
        data |= {"model": "tiny", "seeds": [0]}  # which is included, and small
    suite.write_text(yaml.safe_dump(data), encoding="utf-8")


def words_of(line: str) -> list[str]:
    """Split a command line that needs no shell beyond quotes and comments."""
    bare = re.sub(r"""'[^']*'|"[^"]*"|\s#.*""", "", line)
    assert not re.search(r"[|><;&$`*~()\\]", bare), f"{line!r} needs a shell, and these tests have none"
    return shlex.split(line, comments=True)


def parse(line: str) -> None:
    """Check that a command of posenc, or a GPU script inside its wrappers, exists and accepts its options."""
    words = words_of(line)
    if "python3" in words:
        _, dash, module, *rest = words[words.index("python3") :]
        assert (dash, module[:11]) == ("-m", "scripts.gpu"), f"{line!r}: this cannot be checked"
        import_module(module).parse(rest)
        return
    program, verb, *rest = words
    assert program == "posenc", f"{line!r}: only a command of posenc can be checked without being run"
    with click.Context(group) as outer:
        command = group.get_command(outer, verb)
        assert command is not None, f"no verb {verb!r}"
        command.make_context(verb, rest, parent=outer)


def run(line: str, patch: pytest.MonkeyPatch) -> str:
    """Run a command line in the current folder and return its output."""
    program, *rest = dropwhile(SETTING.match, words_of(line))
    program = Path(program).name
    assert program in PROGRAMS, f"{line!r}: these tests do not know how to run {program!r}"
    return PROGRAMS[program](rest, patch)


def posenc(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Run the command line in this process, since a new one would import torch every time."""
    parse(shlex.join(["posenc", *words]))
    patch.setattr("webbrowser.open", lambda address: None)
    patch.setattr("werkzeug.serving.BaseWSGIServer.serve_forever", answer_once)
    patch.setattr("posenc.evaluate.calibrate.corpus.read_source", beginning)
    patch.setattr("posenc.evaluate.calibrate.job.candidates", few_candidates)
    small = [] if {"--report", "--dry-run"} & set(words) else SMALL.get(words[0], "").split()
    if "slurm" in words:
        small += ["--slurm", "cluster=local"]
    result = CliRunner().invoke(group, [*words, *small])
    assert result.exit_code == 0, f"posenc {shlex.join(words)}\n{result.output}\n{result.exception!r}"
    for option, written in pairwise(words):
        assert option not in ("--plot", "--out") or Path(written).exists(), f"{option} {written}: it was not written"
    return result.stdout


@cache
def beginning(source: str) -> Text:
    """Return the beginning of a text, read once for all pages."""
    text = read_source(source)
    return replace(text, content=text.content[:CHARACTERS])


def few_candidates(name: str, window: int, length: int) -> list[Candidate]:
    """Return every eighth candidate of a calibration."""
    return candidates(name, window, length)[::8]


def answer_once(server: Any) -> None:
    """Answer one real request, then stop as after Ctrl+C."""
    with ThreadPoolExecutor(1) as browser:
        page = browser.submit(lambda: urlopen(f"http://127.0.0.1:{server.port}/", timeout=60).read().decode())
        server.handle_request()
        assert '<pre id="yaml"' in page.result()


def make(words: list[str], _: pytest.MonkeyPatch) -> str:
    """Return the commands that the target would run."""
    return call("make", "-n", *words, cwd=ROOT)


def pip(words: list[str], _: pytest.MonkeyPatch) -> str:
    """Do a dry run that uses only installed packages."""
    assert words[0] == "install"
    flags = ["--dry-run", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    return call(sys.executable, "-m", "pip", *words, *flags, cwd=ROOT)


def python(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Run the one module that a page runs, with narrow heads and without repetition."""
    assert words == ["-m", "scripts.micro"]
    patch.setattr(micro, "RUNS", 1)
    result = CliRunner().invoke(micro.main, ["--heads", "1/1x16", "--model", "tiny"])
    assert result.exit_code == 0, result.output
    return result.output


def gpu_script(words: list[str], _: pytest.MonkeyPatch) -> str:
    """Check the command of a result that was measured on a GPU, which no test has."""
    parse(shlex.join(["python3", *words]))
    return ""


def pre_commit(words: list[str], _: pytest.MonkeyPatch) -> str:
    """Run pre-commit in a repository with our hooks and no files."""
    call("git", "init", "--quiet", "repository")
    shutil.copy(ROOT / ".pre-commit-config.yaml", "repository")
    return call(sys.executable, "-m", "pre_commit", *words, cwd=Path("repository"))


def call(*command: str, cwd: Path | None = None) -> str:
    """Run a program and return its output, or fail with it."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PRE_COMMIT_HOME": os.path.abspath("pc")}
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], str]] = {
    "make": make,
    "pip": pip,
    "posenc": posenc,
    "pre-commit": pre_commit,
    "python": python,
    "python3": gpu_script,
}
