"""The verbs that describe the installation: list, show, plan, plugins, doctor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import posenc
from posenc.cli._output import print_table
from posenc.evaluate import plugin_trial as trial
from posenc.plugins import PluginRecord, plugin_records


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


def test_plugins_lists_what_each_provides(run):
    data = json.loads(run("plugins", "--json").stdout)
    strategies = next(
        record for record in data if record["name"] == "strategies" and record["distribution"] == "posenc"
    )
    assert "strategy lampe" in strategies["provides"]
    assert strategies["seconds"] > 0
    shown = run("plugins").stdout
    assert "posenc_plugins" in shown
    assert "strategy lampe" in shown


def test_plugins_shows_failures(run, monkeypatch: pytest.MonkeyPatch):
    broken = PluginRecord("theirs", "their_plugin", "their-dist", "1.0", failures=("ImportError: no such thing",))
    records = [*plugin_records(), broken]
    monkeypatch.setattr("posenc.evaluate.plugin_trial.plugin_records", lambda: records)
    result = run("plugins")
    assert result.exit_code == 0
    assert "FAILED: ImportError: no such thing" in " ".join(result.stdout.split())
    assert "FAILED ImportError: no such thing" in run("doctor").stdout


@pytest.mark.parametrize("verb", ["plugins", "doctor"])
def test_warnings_are_suppressed_only_for_the_verb(
    run, caplog: pytest.LogCaptureFixture, verb: str, monkeypatch: pytest.MonkeyPatch
):
    logger = logging.getLogger("posenc.plugins")
    known = plugin_records()

    def records():
        logger.warning("said twice")
        return known

    monkeypatch.setattr("posenc.evaluate.plugin_trial.plugin_records", records)
    assert run(verb).exit_code == 0
    assert caplog.messages == []
    logger.warning("heard again")
    assert caplog.messages == ["heard again"]


def test_doctor_passes(run):
    result = run("doctor", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["self_test"]["passed"], data
    checks = ("identity", "generation", "remap", "decoding", "restored")
    assert data["self_test"]["checks"] == dict.fromkeys(checks)
    assert data["versions"]["posenc"] == posenc.__version__
    assert all(data["backends"][name].startswith("runs on cpu, float32") for name in ("reference", "cpu_flash"))
    assert all(plugin["failures"] == [] for plugin in data["plugins"])
    assert data["machine"]["kernels"]["torch CPU flash"]


def test_doctor_prints_a_report_to_paste(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POSENC_BACKEND", "reference")
    shown = run("doctor").stdout
    assert "paste everything from here on into a bug report" in shown
    for part in (posenc.__version__, "cpu_flash", "gpu ", "kernels ", "POSENC_BACKEND", "self-test: passed"):
        assert part in shown
    assert str(Path.home()) not in shown
    assert str(Path(__file__).parents[2]) not in shown


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_doctor_fails_when_the_backends_disagree(run, monkeypatch: pytest.MonkeyPatch, factor: float):
    true = trial.small_attention
    monkeypatch.setattr(
        trial, "small_attention", lambda name, *rest: true(name, *rest) * (factor if name == "cpu_flash" else 1)
    )
    result = run("doctor")
    assert result.exit_code == 1
    assert "self-test: FAILED in 0.0 s, not right: cpu_flash" in result.stdout
    assert "WRONG on cpu" in result.stdout


def test_doctor_survives_a_broken_backend(run, monkeypatch: pytest.MonkeyPatch):
    def broken(name: str, *rest: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(trial, "small_attention", broken)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["self_test"]["reason"].startswith("not right: reference, cpu_flash")
    assert data["backends"]["cpu_flash"] == "fails on cpu: RuntimeError: no such kernel"


def test_doctor_names_gpus(monkeypatch: pytest.MonkeyPatch):
    import torch

    from posenc.cli import doctor

    card = SimpleNamespace(name="Accelerator 9", major=9, minor=1, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert doctor.machine()["gpus"] == ["Accelerator 9, compute capability 9.1, 80 GiB"]


def test_doctor_says_why_a_backend_cannot_run(run):
    from posenc.kernels.reference import ReferenceBackend
    from posenc.testing.tensors import installed

    class Elsewhere(ReferenceBackend):
        name = "elsewhere"
        capabilities = replace(ReferenceBackend.capabilities, devices=("xpu",))

    with installed(Elsewhere()):
        result = run("doctor", "--json")
    assert json.loads(result.stdout)["backends"]["elsewhere"] == "cannot run here: needs xpu"
    assert result.exit_code == 0


def test_a_refusal_is_not_a_failure(run):
    from posenc.kernels.reference import ReferenceBackend
    from posenc.testing.tensors import installed

    class Lacking(ReferenceBackend):
        name = "lacking"

        def refuses(self, *case: object) -> str:
            return "its library is missing; install it"

    with installed(Lacking()):
        result = run("doctor", "--json")
    assert json.loads(result.stdout)["backends"]["lacking"] == "cannot run here: its library is missing; install it"
    assert result.exit_code == 0


def test_doctor_says_why_the_operators_of_xformers_cannot_load(run, monkeypatch: pytest.MonkeyPatch):
    """It says so even without a GPU, where the backend refuses for that reason."""
    from posenc.kernels.windowed import xformers_library

    monkeypatch.setattr(xformers_library, "operators_problem", lambda: "no runtime; pip install it")
    shown = run("doctor").stdout
    assert "note          no runtime; pip install it\n" in shown
    assert "xformers" not in next(line for line in shown.splitlines() if line.startswith("kernels"))
    monkeypatch.setattr(xformers_library, "operators_problem", lambda: None)
    shown = run("doctor").stdout
    assert "note  " not in shown
    assert "xformers" in next(line for line in shown.splitlines() if line.startswith("kernels"))


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        ("posenc.hf.apply.apply", "RuntimeError: it does not work"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "tiny: transformers cannot load it: it does not work"),
    ],
)
def test_doctor_fails_when_the_shipped_model_does(run, monkeypatch: pytest.MonkeyPatch, breaks: str, says: str):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("it does not work")

    monkeypatch.setattr(breaks, fail)
    result = run("doctor")
    assert result.exit_code == 1
    assert says in result.stdout
    assert "Traceback" not in result.output


def test_doctor_fails_when_a_remap_does_nothing(run, monkeypatch: pytest.MonkeyPatch):
    from posenc.hf.apply import apply

    monkeypatch.setattr("posenc.hf.apply.apply", lambda model, name, **params: apply(model, "rope"))
    assert "a remap does not change the shipped model" in run("doctor").stdout


WRONG: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "other tokens": ("rope", lambda out: out.sequences[:, -1].add_(1), "generates other tokens"),
    "another decoding": ("rerope", lambda out: out.logits[3].add_(0.01), "off by 1.0e-02 from the dense reference"),
    "NaN": ("rerope", lambda out: out.logits[5].fill_(float("nan")), "off by nan from the dense reference"),
}


@pytest.mark.parametrize("what", WRONG)
def test_doctor_fails_when_generation_is_wrong(run, monkeypatch: pytest.MonkeyPatch, what: str):
    from importlib.metadata import version

    from transformers import LlamaForCausalLM

    strategy, spoil, says = WRONG[what]
    true = LlamaForCausalLM.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = true(self, *args, **kwargs)
        handle = posenc.attached(self)
        if handle is not None and handle.strategy.name == strategy:
            spoil(out)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    test = json.loads(result.stdout)["self_test"]
    assert says in test["reason"]
    assert f"(with transformers {version('transformers')} and torch {version('torch')})" in test["reason"]
    assert [name for name, failure in test["checks"].items() if failure] == [
        "generation" if strategy == "rope" else "decoding"
    ]


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
