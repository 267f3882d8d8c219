"""The verbs that check the installation: plugins and doctor."""

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
from posenc.evaluate import plugin_trial as trial
from posenc.plugins import PluginRecord, plugin_records


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
    real_records = plugin_records()

    def records():
        logger.warning("said twice")
        return real_records

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

    from posenc.cli import _doctor

    card = SimpleNamespace(name="Accelerator 9", major=9, minor=1, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert _doctor.machine()["gpus"] == ["Accelerator 9, compute capability 9.1, 80 GiB"]


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
