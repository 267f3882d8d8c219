"""Plugins that load and then fail when they are used: each is named, and the others work."""

from __future__ import annotations

from functools import partial

import pytest
from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from tests.hf import tiny
from tests.plugins.fakes import GOOD, Install, assert_built_ins_work, failures, shown

UNDECIDED = """
    from posenc.kernels.reference import ReferenceBackend

    class Undecided(ReferenceBackend):
        name, priority = "undecided", 1000
        def refuses(self, *tensors): raise RuntimeError("ask me later")

    def posenc_register_backends(register):
        register(Undecided())
"""


def test_a_backend_that_fails_when_asked_does_not_keep_auto_from_the_others(install: Install) -> None:
    import torch

    install(UNDECIDED)
    q = torch.randn(1, 1, 3, 8)
    call = partial(posenc.attention, q, q, q, posenc.strategy("rope").plan(3), posenc.Rotary.from_theta(1e4, 8))
    assert call().shape == q.shape
    with pytest.raises(posenc.BackendError, match=r"'undecided' cannot run this case: .*RuntimeError: ask me later"):
        call(backend="undecided")


WRONG = """
    from posenc import PositionStrategy, Segment

    class Wrong(PositionStrategy):
        name, summary, paper = "wrong", "s", "p"
        def segments(self, lengths):
            BODY

    def posenc_register_strategies(register):
        register(Wrong)
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return ()", r"pair (i=0, j=0) is attended by no segment"),
        ("return None", "segments must be a sequence of Segment, got None"),
        ("return [1 / 0]", "ZeroDivisionError: division by zero"),
        ("return ['near', 'far']", "one of them is 'near'"),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, None, i, i / 0)]",
            "segment 'a': key_positions hold a NaN or an infinity",
        ),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, 9, i, i)]",
            "is attended by no segment",
        ),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, None, i, i, 'cubic')]",
            "interpolation must be 'positions' or 'logits', got 'cubic'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_strategy_that_breaks_an_invariant_is_named_and_hurts_nobody(install: Install, body: str, says: str) -> None:
    install(WRONG.replace("BODY", body), distribution="wrong-plugin")
    install(GOOD.format(name="bystander"), distribution="a-good-one")
    assert failures("wrong-plugin") == []  # nothing is wrong until it plans
    found = shown()
    (failure,) = found["wrong-plugin"]
    assert failure.startswith("strategy wrong: PluginError: strategy 'wrong'")
    assert says in failure
    assert found["a-good-one"] == found["posenc"] == []
    refused = CliRunner().invoke(group, ["plan", "wrong", "--prompt", "40"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("posenc: strategy 'wrong'")
    assert "Traceback" not in refused.output
    model = tiny.make("llama")
    with pytest.raises(posenc.PluginError, match="strategy 'wrong'"):
        posenc.apply(model, "wrong")
    assert posenc.attached(model) is None
    with posenc.apply(model, "bystander") as handle:  # the same model takes another plugin's
        assert handle.strategy.name == "bystander"
    assert_built_ins_work()
