"""Properties of the built-in strategies that the public contract (tests/contract) does not require of all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import posenc
from posenc.config import read_config
from posenc.testing.invariants import check_identity

NAMES = list(posenc.strategies())


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("posenc")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


# The longest prompt that each strategy leaves alone at window 64, from the table of the specification.
INACTIVE_AT_64 = {
    "self_extend": 16,
    "rerope": 8,
    "leaky_rerope": 8,
    "dca": 40,
    "string": 21,
    "lm_infinite": 32,
    "streaming_llm": 36,
    "dpe": 8,
    "lampe": 7,
}


@pytest.mark.parametrize("name", sorted(INACTIVE_AT_64))
def test_short_prompts_are_left_alone(name: str) -> None:
    strategy, last = posenc.strategy(name, window=64), INACTIVE_AT_64[name]
    for prompt in range(1, last + 1):
        plan = strategy.plan(prompt)
        check_identity(plan, f"{strategy!r}: ", because="the specification leaves it alone")
    assert not strategy.plan(last + 1).is_identity


def test_every_capability_makes_a_difference_for_some_built_in() -> None:
    """A promise that no strategy breaks is untested, so some built-in must break each one."""
    by_name = {name: posenc.strategies()[name].capabilities for name in NAMES}
    assert {name for name, c in by_name.items() if not c.monotone} >= {"dca", "string"}
    assert {name for name, c in by_name.items() if c.drops_keys} >= {"lm_infinite", "streaming_llm"}
    for name in ("dca", "string"):
        relative = posenc.strategy(name, window=450).plan(500).relative_positions()
        assert any((np.diff(row[~np.isnan(row)][::-1]) < 0).any() for row in relative)
    for name, capabilities in by_name.items():
        if name in INACTIVE_AT_64 and not capabilities.bounded:
            assert posenc.strategy(name, window=64).plan(1500).max_relative >= 64


ONE_PICK = {"ranges": [{"up_to": 99, "pick": {"strategy": "yarn", "because": "a test"}}]}


@pytest.mark.parametrize(
    ("config", "active_from", "follows"),
    [
        ({"strategy": "rope"}, 0, False),
        ({"strategy": "rerope"}, 0, False),
        ({"strategy": {"rerope": {"active_from": 9}}}, 9, True),
        ({"strategy": "lampe"}, 0, True),
        ({"strategy": "yarn"}, 0, False),
        ({"strategy": "dynamic"}, 0, True),
        ({"strategy": "rerope", "frequencies": "yarn"}, 0, False),
        ({"strategy": "rerope", "frequencies": "dynamic"}, 0, True),
        ({"strategy": {"rerope": {"active_from": 9}}, "frequencies": "yarn"}, 9, True),
        ({"strategy": {"auto": {"calibration": ONE_PICK}}}, 0, True),
        ({"strategy": {"auto": {"calibration": ONE_PICK, "active_from": 9}}}, 9, True),
    ],
    ids=str,
)
def test_what_depends_on_the_length_of_the_prompt(config: dict[str, Any], active_from: int, follows: bool) -> None:
    strategy = read_config(config).make(64)
    assert (strategy.active_from, strategy.follows_prompt) == (active_from, follows)
