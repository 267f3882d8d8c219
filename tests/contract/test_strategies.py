"""Every registered strategy, including third-party ones, under the public contract."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

import posenc
from posenc.planning.composed import ComposedStrategy
from posenc.positions import PositionStrategy


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("posenc")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def picks(*ranges: tuple[int, str, dict[str, Any]], beyond: tuple[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return parameters of ``auto``: a table like that of a calibration file."""

    def pick(name: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"strategy": name, "params": params, "because": "the test says so"}

    table: dict[str, Any] = {"ranges": [{"up_to": up_to, "pick": pick(name, params)} for up_to, name, params in ranges]}
    if beyond is not None:
        table["beyond"] = [pick(*beyond)]
    return {"calibration": table}


REQUIRED: dict[str, tuple[dict[str, Any], ...]] = {
    "auto": (
        picks((20, "rope", {}), (60, "rerope", {"window_size": 9}), (100, "lampe", {"head": 4, "mapping": 20})),
        picks((30, "dca", {"chunk_size": 12, "local_size": 3}), beyond=("self_extend", {"group": 3, "window_size": 5})),
        picks((40, "rope", {}), (110, "yarn", {"factor": 4.0}), beyond=("streaming_llm", {"window_size": 9})),
    ),
}
"""Strategies with a parameter that has no default."""


@pytest.mark.parametrize("name", posenc.strategies())
class TestRegistered(posenc.testing.StrategyContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.strategy = posenc.strategies()[name].factory
        self.params = REQUIRED.get(name, ({},))


OTHER_PARAMETERS: list[tuple[str, tuple[dict[str, Any], ...]]] = [
    (
        "lampe",
        (
            {"head": 3, "tail": 2, "mapping": 40},
            {"mapping": 9, "granularity": "uniform"},
            {"mapping": 30, "granularity": "head_only"},
            {"mapping": {"c": 60, "a": 0.01, "b": 0}, "attention_factor": 1.0},
        ),
    ),
    ("self_extend", ({"group": 3, "window_size": 10}, {"log_scale": True})),
    ("rerope", ({"window_size": 1}, {"log_scale": False})),
    ("leaky_rerope", ({"window_size": 5, "factor": 2.5},)),
    ("dca", ({"chunk_size": 12, "local_size": 3},)),
    ("string", ({"shift": 9, "window_size": 4},)),
    ("lm_infinite", ({"window_size": 6, "sinks": 0}, {"window_size": 1, "sinks": 30})),
    ("streaming_llm", ({"window_size": 1, "sinks": 0}, {"window_size": 9, "sinks": 2})),
    ("dpe", ({"scales": tuple(range(1, 17)), "window_size": 7},)),
    ("yarn", ({"factor": 8.0, "attention_factor": 1.5},)),
]


@pytest.mark.parametrize(("name", "params"), OTHER_PARAMETERS)
class TestOtherParameters(posenc.testing.StrategyContract):
    settings = hypothesis.settings(posenc.testing.StrategyContract.settings, max_examples=10)

    @pytest.fixture(autouse=True)
    def _choose(self, name: str, params: tuple[dict[str, Any], ...]) -> None:
        self.strategy = posenc.strategies()[name].factory
        self.params = params


def lampe_with_yarn(window: int | None = None) -> PositionStrategy:
    return ComposedStrategy(posenc.strategy("lampe", window=window), posenc.strategy("yarn", window=window))


class TestComposed(posenc.testing.StrategyContract):
    strategy = lampe_with_yarn


class TestOneObject(posenc.testing.StrategyContract):
    strategy = posenc.strategy("rerope", window=64)
