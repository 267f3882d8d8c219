"""Plots are sampled, exact at the samples, and written completely or not at all."""

from __future__ import annotations

import builtins
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posenc
from posenc.display import viz
from posenc.errors import InvalidInputError, PosencError
from posenc.files import plain, replacing

NAMES = sorted(posenc.strategies())


def strategy_plan(name: str, prompt: int, total: int | None = None) -> posenc.PositionPlan:
    return posenc.strategy(name, window=64, **EXTRA.get(name, {})).plan(prompt, total)


EXTRA: dict[str, dict[str, Any]] = {
    name: {"factor": 4}
    for name in NAMES
    if "factor" in posenc.strategies()[name].params.model_fields and name != "leaky_rerope"
}
EXTRA["longrope"] = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
EXTRA["dpe"] = {"scales": [2, 4, 8]}


@pytest.mark.parametrize("name", ["rope", "lampe", "self_extend", "rerope", "dca", "string", "lm_infinite", "dpe"])
def test_samples_are_the_plans_own_values(name: str):
    plan = strategy_plan(name, 150, 170)
    index, sampled = viz.sample_map(plan, side=40)
    dense = plan.relative_positions()
    if dense.ndim == 3:
        dense = dense.max(-1)
    assert index[0] == 0
    assert index[-1] == 169
    assert len(index) == 40
    np.testing.assert_array_equal(sampled, dense[np.ix_(index, index)])


def test_a_short_plan_is_drawn_in_full():
    plan = strategy_plan("rerope", 30)
    index, sampled = viz.sample_map(plan)
    assert (index == np.arange(30)).all()
    np.testing.assert_array_equal(sampled, plan.relative_positions())


def test_a_long_plan_is_drawn_in_little_memory(tmp_path: Path):
    plan = strategy_plan("self_extend", 200_000)
    tracemalloc.start()
    viz.plot_plan(plan, tmp_path / "long.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_the_distance_curve_is_a_row_of_the_plan():
    plan = strategy_plan("lm_infinite", 200)
    distances, relative = viz.distance_curve(plan, 150)
    np.testing.assert_array_equal(relative, plan.relative_positions()[150, [150 - d for d in distances]])
    assert np.isnan(relative).any()


def test_several_maps_share_a_scale_and_a_file(tmp_path: Path):
    plans = {name: strategy_plan(name, 300) for name in ("rope", "lampe")}
    assert viz.plot_maps(plans, tmp_path / "maps.svg").stat().st_size > 1000
    assert viz.plot_maps({"rope": plans["rope"]}, tmp_path / "one.png").exists()


@pytest.mark.parametrize("log", [False, True])
def test_line_plots_are_written(tmp_path: Path, log: bool):
    series = {"a": [(64, 3.0, 0.1), (128, 4.0, 0.2)], "b": [(64, 3.0, float("nan")), (128, float("inf"), 0.2)]}
    viz.plot_lines(series, tmp_path / "lines.png", title="t", ylabel="y", window=64, log=log)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.png"]


def test_a_failing_plot_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "map.png"
    file.write_bytes(b"old")

    class Broken:
        def savefig(self, path: Path, **kwargs: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InvalidInputError, match="cannot be written \\(No space left on device\\)"):
        viz.save(Broken(), file)
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PosencError, match=r"pip install 'posenc\[plot\]'"):
        viz.plot_plan(strategy_plan("rope", 8), tmp_path / "map.png")


def test_replacing_keeps_the_old_file_on_any_error(tmp_path: Path):
    file = tmp_path / "data.json"
    file.write_text("old")

    def interrupted() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_plain_data_contains_no_nan():
    data = {1: np.array([1.0, np.nan]), "b": (np.int64(3), float("inf"), None, True, Path("x"))}
    assert plain(data) == {"1": [1.0, None], "b": [3, None, None, True, "x"]}
