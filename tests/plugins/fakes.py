"""Sources of fake plugins, and what posenc says of them."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from posenc.plugins import plugin_records

Install = Callable[..., str]

GOOD = """
    from posenc import Capabilities, PositionStrategy, hookimpl
    from posenc.plan import PositionPlan

    class Mine(PositionStrategy):
        name = "{name}"
        summary = "for the tests"
        paper = "nobody, 2026"

        def segments(self, lengths):
            return PositionPlan.identity(lengths).segments

    @hookimpl
    def posenc_register_strategies(register):
        register(Mine)
"""


def failures(distribution: str) -> list[str]:
    return [failure for r in plugin_records() if r.distribution == distribution for failure in r.failures]


def shown() -> dict[str, list[str]]:
    """What ``posenc plugins`` says went wrong, by distribution."""
    result = CliRunner().invoke(group, ["plugins", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, list[str]] = {}
    for record in json.loads(result.stdout):
        found.setdefault(record["distribution"], []).extend(record["failures"])
    return found


def assert_built_ins_work() -> None:
    assert posenc.strategy("self_extend", window_size=4).plan(20).max_relative > 0
    assert posenc.strategies()["rerope"].distribution == "posenc"
