"""The verbs that describe strategies and model families: list, show, plan, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posenc
from posenc.cli._output import print_table


def test_list_names_every_strategy_and_its_distribution(run):
    data = json.loads(run("list", "--json").stdout)
    assert {row["name"] for row in data} == set(posenc.strategies())
    kinds = {row["name"]: row["kind"] for row in data}
    assert (kinds["lampe"], kinds["yarn"]) == ("positions", "frequencies")
    shown = run("list").stdout
    assert all(name in shown for name in posenc.strategies())


@pytest.mark.parametrize("seam", ["adapters", "backends"])
def test_list_shows_adapters_and_backends(run, seam: str):
    names = set(getattr(posenc, seam)())
    assert names
    assert {row["name"] for row in json.loads(run("list", f"--{seam}", "--json").stdout)} == names
    assert all(name in run("list", f"--{seam}").stdout for name in names)


@pytest.mark.parametrize("name", sorted(posenc.strategies()))
def test_show_describes_every_strategy(run, name: str):
    info = posenc.strategies()[name]
    data = json.loads(run("show", name, "--json").stdout)
    assert (data["name"], data["paper"], data["distribution"]) == (name, info.paper, info.distribution)
    assert [param["name"] for param in data["params"]] == list(info.params.model_fields)
    shown = run("show", name)
    assert shown.exit_code == 0
    assert all(key in shown.stdout for key in info.params.model_fields)


def test_show_prints_defaults_and_types(run):
    params = {param["name"]: param for param in json.loads(run("show", "self_extend", "--json").stdout)["params"]}
    assert params["group"]["default"] == 8
    assert params["group"]["type"] == "int"
    assert params["group"]["description"]


@pytest.mark.parametrize("verb", ["show", "plan"])
def test_an_unknown_strategy_suggests_the_nearest(run, verb: str):
    result = run(verb, "lampee", *(["--prompt", "8"] if verb == "plan" else []))
    assert result.exit_code == 2
    assert "no strategy named 'lampee'. Did you mean 'lampe'? Installed: " in result.stderr
    assert result.stdout == ""


def test_plan_explains_the_segments(run):
    result = run("plan", "rerope", "--prompt", "64", "--param", "window_size=16", "--window", "32")
    plan = posenc.strategy("rerope", window=32, window_size=16).plan(64)
    assert result.stdout == plan.explain() + "\n"


def test_plan_prints_json(run):
    arguments = ("plan", "lampe", "--prompt", 256, "--total", 300, "--window", 128, "-p", "mapping=64", "-p", "head=8")
    data = json.loads(run(*arguments, "--json").stdout)
    plan = posenc.strategy("lampe", window=128, mapping=64, head=8).plan(256, 300)
    assert (data["prompt"], data["total"], data["window"]) == (256, 300, 128)
    assert data["max_relative"] == plan.max_relative
    assert [segment["name"] for segment in data["segments"]] == [segment.name for segment in plan.segments]
    assert sum(segment["pairs"] for segment in data["segments"]) == 300 * 301 // 2
    relative = plan.relative_positions()[-1]
    for row in data["distances"]:
        assert row["relative"] == relative[299 - row["distance"]]


def test_plan_json_has_no_nan(run):
    result = run("plan", "lm_infinite", "--prompt", 100, "-p", "window_size=8", "-p", "sinks=2", "--json")
    rows = json.loads(result.stdout, parse_constant=pytest.fail)["distances"]
    assert {row["relative"] for row in rows if row["segment"] is None} == {None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rope", "--prompt", "0"], "prompt must be at least 1 token, got 0."),
        (["rope", "--prompt", "-3"], "prompt must be at least 1 token, got -3."),
        (["rope", "--prompt", "8", "--total", "7"], "total (7) must be at least prompt (8)"),
        (["rope", "--prompt", "8", "--window", "0"], "rope.window: must be a positive number of tokens, got 0."),
        (["lampe", "--prompt", "8", "-p", "hed=3"], "lampe.hed: no such key. Known keys: "),
        (["self_extend", "--prompt", "8", "-p", "group=0"], "self_extend.group: "),
        (["self_extend", "--prompt", "8", "-p", "group=x"], "self_extend.group: "),
        (["rerope", "--prompt", "8"], "rerope.window_size: its default is a fraction of the pretraining window"),
        (["rope", "--prompt", "8", "-p", "head"], "--param 'head': expected KEY=VALUE"),
        (["rope", "--prompt", "8", "-p", "=3"], "--param '=3': expected KEY=VALUE"),
        (["lampe", "--prompt", "8", "-p", "mapping={c: 1"], "the value is not valid YAML"),
        (["lampe", "--prompt", "8", "-p", "head=1", "-p", "head=2"], "--param head: given twice."),
        (["lampe", "--prompt", "8", "-p", "mapping=no-such.json", "--window", "64"], "lampe.mapping: "),
    ],
)
def test_bad_input_is_one_message(run, arguments: list[str], said: str):
    result = run("plan", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("posenc: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_length_that_is_not_a_number_is_a_usage_error(run):
    result = run("plan", "rope", "--prompt", "many")
    assert result.exit_code == 2
    assert "'many' is not a valid integer" in result.stderr


def test_a_head_larger_than_the_prompt_gives_the_identity(run):
    data = json.loads(run("plan", "lampe", "--prompt", 20, "--window", 64, "-p", "head=30", "--json").stdout)
    assert data["is_identity"]


def test_a_plot_is_written_completely(run, tmp_path: Path):
    file = tmp_path / "map.png"
    result = run("plan", "self_extend", "--prompt", 3000, "--window", 256, "--plot", file)
    assert result.exit_code == 0, result.stderr
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert f"plot: {file}" in result.stdout


def test_a_plot_into_a_missing_folder_is_refused(run, tmp_path: Path):
    result = run("plan", "rope", "--prompt", 8, "--plot", tmp_path / "no" / "map.png")
    assert result.exit_code == 2
    assert "cannot be written (No such file or directory)" in result.stderr


def test_a_plot_of_an_unknown_kind_is_refused(run, tmp_path: Path):
    result = run("plan", "rope", "--prompt", 8, "--plot", tmp_path / "map.doc")
    assert result.exit_code == 2
    assert "must end in .png, .pdf, .svg" in result.stderr
    assert not list(tmp_path.iterdir())


def test_numbers_are_never_truncated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    heads = [f"{number} tokens" for number in range(12)]
    print_table("t", ["strategy", *heads], [["a long label " * 9, *["123.45 ± 67.89"] * 12]], numbers=heads)
    assert capsys.readouterr().out.count("123.45 ± 67.89") == 12


def test_adapters_lists_families_with_their_verdict(run):
    verdicts = {row["family"]: row["verdict"] for row in json.loads(run("adapters", "--json").stdout)}
    assert verdicts["llama"] == "exact"
    assert verdicts["falcon"].startswith("refused: ")
    exact = json.loads(run("adapters", "--exact", "--json").stdout)
    assert {row["family"] for row in exact} == {name for name, verdict in verdicts.items() if verdict == "exact"}
    assert "refused" in run("adapters", "gptj").stdout
    unknown = run("adapters", "lama")
    assert unknown.exit_code == 2
    assert "'lama'" in unknown.stderr
