"""The calibration file is written atomically, read strictly, refused for another model, and used by lampe and auto."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import posenc
from posenc.calibration.file import Calibration, LossScore, read, write
from posenc.calibration.recommend import find_profile, recommend
from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.evaluate.calibrate import job as work
from posenc.evaluate.models import Loaded, load
from posenc.hf.apply import find_adapter
from posenc.hf.fingerprint import fingerprint
from posenc.planning.planner import Planner
from tests.calibration.conftest import WINDOW, make_model

Calibrated = tuple[work.CalibrationOutcome, Path]


def taken(model: Any) -> Any:
    return fingerprint(model, find_adapter(model))


def test_a_file_is_read_as_it_was_written(calibrated: Calibrated, tmp_path: Path):
    outcome, file = calibrated
    assert read(file) == outcome.calibration
    as_json = tmp_path / "calibration.json"
    as_json.write_text(json.dumps(yaml.safe_load(file.read_text())))
    assert read(as_json) == outcome.calibration
    assert file.stat().st_size < 20_000
    assert set(outcome.calibration.versions) == {"python", "posenc", "torch", "transformers", "numpy"}


def test_an_unwritable_place_leaves_the_old_file(calibrated: Calibrated, monkeypatch):
    outcome, file = calibrated
    before = file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InvalidInputError, match=r"cannot be written \(No space left on device\)"):
        write(outcome.calibration, file)
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir() if path.is_file()] == [file.name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "not a calibration file"),
        ({"version": 2}, "calibration file version 2; this posenc reads 1"),
        ({"strategies": {}}, r"damaged calibration file \(strategies: "),
        ({"strateggies": 1}, r"damaged calibration file \(strateggies: "),
        ({"native": {"32": {"loss": "high"}}}, r"damaged calibration file \(native.32.loss: "),
    ],
)
def test_a_wrong_file_is_refused(calibrated: Calibrated, tmp_path: Path, change: dict[str, Any], said: str):
    data = yaml.safe_load(calibrated[1].read_text()) | change
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(data))
    for attempt in (lambda: read(file), lambda: posenc.strategy("auto", window=WINDOW, calibration=file)):
        with pytest.raises(InvalidConfigError, match=said) as caught:
            attempt()
        assert "wrong.yaml" in str(caught.value)


def test_the_fingerprint_identifies_the_checkpoint(loaded: Loaded):
    here = taken(loaded.model)
    assert here == taken(make_model(0))
    assert here == taken(make_model(0).to(torch.bfloat16))  # the same checkpoint in another dtype
    assert (here.model_type, here.window, here.layers, here.heads, here.vocabulary) == ("llama", WINDOW, 1, 2, 60)
    assert here.differences(taken(make_model(1))) == [f"weights: {here.weights} and {taken(make_model(1)).weights}"]
    trained = make_model(0)
    with torch.no_grad():
        trained.model.layers[0].self_attn.q_proj.weight += 0.1
    assert taken(trained).weights != here.weights


@pytest.mark.parametrize("name", ["lampe", "auto"])
def test_another_model_is_refused_and_left_untouched(calibrated: Calibrated, name: str):
    model = make_model(1)
    params = {"lampe": {"mapping": calibrated[1]}, "auto": {"calibration": calibrated[1]}}[name]
    before = model(torch.arange(40)[None]).logits
    with pytest.raises(
        InvalidConfigError, match=r"measured on another model\. .* differ in weights: .*posenc calibrate"
    ):
        posenc.apply(model, name, **params)
    assert posenc.attached(model) is None
    assert torch.equal(model(torch.arange(40)[None]).logits, before)


def test_a_combination_with_frequencies_is_refused_for_another_model_too(calibrated: Calibrated):
    with pytest.raises(InvalidConfigError, match="was measured on another model"):
        posenc.apply(make_model(1), "lampe", mapping=calibrated[1], frequencies="yarn")


def test_lampe_uses_the_head_of_the_fitted_curve(calibrated: Calibrated, loaded: Loaded):
    calibration = calibrated[0].calibration
    made = posenc.strategy("lampe", window=WINDOW, mapping=calibrated[1])
    assert (made.head, made.tail) == (calibration.head, calibration.tail)
    by_value = posenc.strategy("lampe", window=WINDOW, mapping=calibration.mapping)
    assert made.mapping_length(96) == by_value.mapping_length(96)
    assert posenc.strategy("lampe", window=WINDOW, mapping=calibrated[1], head=3).head == 3
    again = posenc.strategy(**made.describe(), window=WINDOW)
    np.testing.assert_array_equal(again.plan(80).relative_positions(), made.plan(80).relative_positions())
    with posenc.apply(loaded.model, "lampe", mapping=calibrated[1]) as handle:
        assert handle.strategy.head == calibration.head


def test_auto_delegates_to_the_measured_picks(calibrated: Calibrated, loaded: Loaded, tmp_path: Path):
    calibration = changed(calibrated[0].calibration, 64, "rerope", gap=-0.5, report_gap=-0.5)
    calibration = changed(calibration, 96, "lampe", gap=-0.5, report_gap=-0.5)
    file = write(calibration, tmp_path / "calibration.yaml")
    with posenc.apply(loaded.model, "auto", calibration=file) as handle:
        for length, name in ((64, "rerope"), (96, "lampe")):
            params = calibration.strategies[name][length].params
            expected = posenc.strategy(name, window=WINDOW, **params).plan(length - 20, length)
            plan = handle.plan(length - 20, length)
            np.testing.assert_array_equal(plan.relative_positions(), expected.relative_positions())
            np.testing.assert_array_equal(plan.query_scale, expected.query_scale)
            assert plan.explain().startswith(f"auto -> {name}(")
        described = handle.describe()["strategy"]
        assert [part["up_to"] for part in described["calibration"]["ranges"]] == [32, 64, 96]
        assert all("nats per token" in part["pick"]["because"] for part in described["calibration"]["ranges"])
        again = posenc.strategy(**json.loads(json.dumps(described)), window=WINDOW)
        np.testing.assert_array_equal(again.plan(90).relative_positions(), handle.plan(90).relative_positions())
        with pytest.raises(InvalidConfigError, match="was measured on another model"):
            posenc.apply(make_model(1), again)  # the model is part of the description, without the file


def changed(calibration: Calibration, length: int, name: str, *, gap: float, report_gap: float) -> Calibration:
    """Return the calibration with another advantage of one strategy over the native model."""
    choice = calibration.strategies[name][length]
    native = calibration.native[length]

    def score(gap: float) -> LossScore:
        return LossScore(
            loss=native.loss + gap, standard_error=0.1, over_native=gap, over_native_error=0.01, documents=10
        )

    new = choice.model_copy(update={"calibration": score(gap), "report": score(report_gap)})
    strategies = {key: dict(value) for key, value in calibration.strategies.items()}
    for key in strategies:  # no other strategy is better
        strategies[key][length] = strategies[key][length].model_copy(update={"calibration": score(0.5)})
    strategies[name][length] = new
    return calibration.model_copy(update={"strategies": strategies})


@pytest.mark.parametrize(
    ("length", "gap", "report_gap", "picked"),
    [
        (WINDOW, -0.5, -0.5, "rerope"),  # clearly better, on both texts
        (WINDOW, -0.5, 0.0, "rope"),  # better only on the text it was chosen on: luck
        (WINDOW, -0.015, -0.5, "rope"),  # within two standard errors
        (2 * WINDOW, -0.015, 0.0, "rerope"),  # beyond the window the lowest mean wins
        (2 * WINDOW, 0.1, 0.1, "rope"),  # unless the model alone is better
    ],
)
def test_a_strategy_is_used_inside_the_window_only_if_measured_better(
    calibrated: Calibrated, length: int, gap: float, report_gap: float, picked: str
):
    table = recommend(
        changed(calibrated[0].calibration, length, "rerope", gap=gap, report_gap=report_gap), source="test"
    )
    (found,) = (part.pick for part in table.ranges if part.up_to == length)
    assert found.strategy == picked


def test_strategies_that_drop_keys_are_never_picked(calibrated: Calibrated):
    calibration = changed(calibrated[0].calibration, 96, "rerope", gap=-0.5, report_gap=-0.5)
    strategies = {**calibration.strategies, "lm_infinite": calibration.strategies["rerope"]}
    del strategies["rerope"]
    table = recommend(calibration.model_copy(update={"strategies": strategies}), source="test")
    picks = [part.pick for part in table.ranges] + list(table.beyond)
    assert "lm_infinite" not in {pick.strategy for pick in picks}


def test_lengths_that_were_not_measured_get_a_pick(calibrated: Calibrated):
    """Inside the window it is the identity; beyond the longest length, the best pick that stays inside the window."""
    calibration = calibrated[0].calibration
    longer = calibration.model_copy(update={"settings": calibration.settings.model_copy(update={"lengths": (64, 96)})})
    table = recommend(longer, source="test")
    assert [part.up_to for part in table.ranges] == [WINDOW, 64, 96]
    assert "nothing was measured" in table.ranges[0].pick.because
    pick = {"because": "a test"}
    auto = posenc.strategy(
        "auto",
        window=WINDOW,
        calibration={
            "ranges": [{"up_to": 96, "pick": {"strategy": "self_extend", "params": {"group": 4}, **pick}}],
            "beyond": [
                {"strategy": "self_extend", "params": {"group": 4}, **pick},
                {"strategy": "yarn", "params": {"factor": 4.0}, **pick},
                {"strategy": "rerope", "params": {"window_size": 8}, **pick},
            ],
        },
    )
    assert auto.plan(96).strategy == "auto -> self_extend(group=4)"
    assert auto.plan(97).strategy == "auto -> self_extend(group=4)"  # 8 + 89 / 4 is still inside
    assert auto.plan(200).strategy == "auto -> rerope(window_size=8)"
    assert auto.plan(200).max_relative < WINDOW


def test_auto_logs_its_choice(calibrated: Calibrated, caplog, monkeypatch):
    monkeypatch.setenv("POSENC_TRACE", "1")
    with caplog.at_level(logging.INFO, logger="posenc"):
        posenc.strategy("auto", window=WINDOW, calibration=calibrated[1]).plan(90)
    (line,) = [record.getMessage() for record in caplog.records if "auto: 90 tokens" in record.getMessage()]
    assert "at 96 tokens" in line
    assert "nats per token" in line


def test_auto_without_a_file_is_an_error(loaded: Loaded):
    with pytest.raises(InvalidConfigError, match=r"no calibration file given.*'posenc calibrate MODEL' measures one"):
        posenc.strategy("auto", window=64).plan(10)
    with pytest.raises(InvalidConfigError, match=r"ships no profile of this model \(llama, 1 layers, hidden size 16"):
        posenc.apply(loaded.model, "auto")
    assert posenc.attached(loaded.model) is None
    with pytest.raises(InvalidConfigError, match=r"nowhere.yaml: cannot be read"):
        posenc.strategy("auto", window=64, calibration="nowhere.yaml")


def test_auto_can_be_chosen_in_a_configuration_file(calibrated: Calibrated, loaded: Loaded, tmp_path: Path):
    for content in ({"auto": {"calibration": str(calibrated[1])}}, {"name": "auto", "calibration": str(calibrated[1])}):
        file = tmp_path / "posenc.yaml"
        file.write_text(yaml.safe_dump({"strategy": content}))
        with posenc.apply(loaded.model, file) as handle:
            assert handle.strategy.name == "auto"


def test_frequencies_follow_the_pick():
    pick = {"because": "a test"}
    auto = posenc.strategy(
        "auto",
        window=WINDOW,
        active_from=9,
        calibration={
            "ranges": [
                {"up_to": 20, "pick": {"strategy": "rope", **pick}},
                {"up_to": 99, "pick": {"strategy": "yarn", "params": {"factor": 4.0}, **pick}},
            ]
        },
    )
    base = posenc.Rotary.from_theta(1e4, 16)
    yarn = posenc.strategy("yarn", window=WINDOW, factor=4.0).rotary(base, 50)
    assert auto.rotary(base, 9) is base
    assert auto.rotary(base, 20) is base
    assert torch.equal(auto.rotary(base, 21).inv_freq, yarn.inv_freq)
    assert auto.capabilities.changes_frequencies
    assert auto.capabilities.frequencies_by_length


def test_one_pick_of_frequencies_is_kept_apart_from_the_models_own():
    pick = {"strategy": "yarn", "because": "a test"}
    table = {"ranges": [{"up_to": 99, "pick": pick}]}
    planner = Planner(posenc.strategy("auto", window=WINDOW, active_from=9, calibration=table))
    base = posenc.Rotary.from_theta(1e4, 16)
    yarn = posenc.strategy("yarn", window=WINDOW).rotary(base, 50)
    assert planner.rotary(base, 5) is base  # up to active_from nothing changes, and the planner must not keep that
    assert torch.equal(planner.rotary(base, 50).inv_freq, yarn.inv_freq)


def test_a_pick_may_differ_by_layer(monkeypatch):
    def for_layer(self: Any, layer: int, layers: int) -> Any:
        return self if layer == 0 else posenc.strategy("rerope", window=self.window, window_size=9)

    monkeypatch.setattr(posenc.strategies()["rerope"].factory, "for_layer", for_layer)
    pick = {"strategy": "rerope", "params": {"window_size": 5}, "because": "a test"}
    auto = posenc.strategy("auto", window=WINDOW, calibration={"ranges": [{"up_to": 99, "pick": pick}]})
    assert auto.for_layer(0, 2) is auto
    assert [auto.for_layer(layer, 2).plan(50).max_relative for layer in (0, 1)] == [5, 9]
    assert auto.for_layer(1, 2).describe() != auto.describe()


def test_the_shipped_profile_belongs_to_the_shipped_model():
    model = load("tiny").model
    path = find_profile(taken(model))
    assert path is not None
    calibration = read(path)
    assert re.match(r"posenc calibrate (.* )?tiny ", calibration.command)
    with posenc.apply(model, "auto") as handle:
        assert handle.plan(10).is_identity
        assert not handle.plan(1024).is_identity
        assert handle.plan(1024).max_relative < 256
    with posenc.apply(model, "lampe", mapping=path) as handle:
        lengths = [length for length in calibration.lengths if length > 256]
        assert max(handle.plan(length).max_relative for length in lengths) < 256
