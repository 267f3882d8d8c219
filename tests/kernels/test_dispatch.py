"""posenc.attention before a kernel runs: arguments that cannot be used, and the choice of a backend."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

import posenc
from posenc.kernels.choice import AttentionCase
from posenc.kernels.dispatch import checked_backend
from posenc.plan import PositionPlan


@pytest.mark.parametrize("backend", ["reference", "cpu_flash", "triton"])
def test_positions_per_frequency_are_counted_before_they_broadcast(backend: str) -> None:
    """Also where a backend is asked directly, as the layers of a model ask it."""
    rotary, x = posenc.Rotary.from_theta(1e4, 8), torch.randn(1, 2, 9, 8)
    own = posenc.backends()[backend].backend
    for columns, query in ((1, True), (1, False), (2, True), (8, False)):
        for q_len in (9, 1):
            with pytest.raises(posenc.InvalidInputError, match=rf"\[L, 4\] .*\(\d, {columns}\)"):
                own.attend(x[:, :, -q_len:], x, x, per_column(columns, query), rotary, scale=1.0, mask=None)
    with pytest.raises(posenc.InvalidInputError, match=r"shape \(\)"):
        rotary.tables(np.array(3))


def call(**changes: object) -> object:
    given: dict[str, object] = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 9, 8),
        "v": torch.randn(2, 2, 9, 8),
        "plan": posenc.strategy("rope").plan(9),
        "rotary": posenc.Rotary.from_theta(1e4, 8),
        **changes,
    }
    return posenc.attention(**given)  # type: ignore[arg-type]


LENGTH_8 = posenc.strategy("rope").plan(8)
LENGTH_9 = posenc.strategy("rope").plan(9)


def per_column(columns: int, query: bool = True) -> PositionPlan:
    """A plan whose query or key positions have so many columns."""
    index = LENGTH_9.segments[0].query_positions
    wide = np.repeat(index[:, None], columns, 1)
    positions = (wide, index) if query else (index, wide)
    return PositionPlan.build(posenc.Lengths(9, 9), [posenc.Segment.band("all", 9, 0, None, *positions)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 4, 8)}, "batch, heads, tokens"),
        ({"q": torch.randn(2, 3, 3, 8)}, "multiple"),
        ({"q": torch.randn(2, 0, 3, 8)}, "multiple"),
        ({"q": torch.randn(1, 4, 3, 8)}, "differ"),
        ({"q": torch.randn(2, 4, 12, 8)}, "Lq <= Lk"),
        ({"q": torch.randn(2, 4, 3, 8).double()}, "one floating dtype"),
        ({"k": np.zeros((2, 2, 9, 8))}, r"k must be a torch tensor .*ndarray"),
        ({"v": None}, r"v must be a torch tensor .*None"),
        ({"v": torch.zeros(2, 2, 9, 8, device="meta")}, "one device, got cpu, cpu, meta"),
        ({"plan": LENGTH_8}, "total=9"),
        ({"plan": [LENGTH_9, LENGTH_8]}, "total=9"),
        ({"plan": [LENGTH_9] * 3}, "3 plans for 2"),
        ({"plan": []}, "0 plans for 2"),
        ({"plan": None}, r"not None \(NoneType\): make one with"),
        ({"plan": [LENGTH_9, None]}, r"not None \(NoneType\)"),
        ({"plan": "rope"}, r"not 'r' \(str\)"),
        ({"plan": posenc.strategy("rope")}, r"RoPE\): make one with"),
        ({"plan": LENGTH_9.segments}, r"Segment\): make one with"),
        ({"rotary": None}, r"must be a Rotary, not None.*from_theta"),
        ({"rotary": 1e4}, r"must be a Rotary, not 10000.0"),
        ({"rotary": torch.ones(4)}, r"must be a Rotary, not a tensor \[4\]"),
        ({"rotary": posenc.Rotary(torch.ones(4, device="meta"))}, "'meta', where it holds no numbers"),
        ({"rotary": posenc.Rotary(torch.tensor([1.0, math.nan, 0.1, 0.0]))}, "NaN or an infinity"),
        ({"rotary": posenc.Rotary(torch.tensor([1.0, math.inf, 0.1, 0.0]))}, "NaN or an infinity"),
        ({"rotary": posenc.Rotary(torch.ones(4, requires_grad=True))}, r"requires a gradient.*detach"),
        ({"rotary": posenc.Rotary.from_theta(1e4, 16)}, "16 channels|channels 0..15"),
        ({"plan": per_column(1)}, r"\[L, 4\] with one for each of the 4 .*shape \(9, 1\)"),
        ({"plan": per_column(2, query=False)}, r"\[L, 4\] .*not for heads.*\(9, 2\)"),
        ({"plan": [LENGTH_9, per_column(8)]}, r"\[L, 4\] .*\(9, 8\)"),
        ({"mask": torch.ones(2, 1, 3, 9)}, "bool"),
        ({"mask": [[True]]}, r"mask must be a bool tensor.*list"),
        ({"mask": torch.ones(2, 1, 3, 8, dtype=torch.bool)}, r"\(2, 1, 3, 9\)"),
        ({"mask": torch.ones(1, 1, 3, 9, dtype=torch.bool)}, r"\(2, 1, 3, 9\)"),
        ({"mask": torch.ones(2, 1, 3, 9, dtype=torch.bool, device="meta")}, "mask must be on the device of q, cpu"),
        ({"scale": "1"}, "scale must be a finite number"),
        ({"scale": torch.ones(())}, "scale must be a finite number or None, got a tensor"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"scale": True}, "scale must be a finite number"),
        ({"softcap": 0}, "softcap must be a finite number above 0"),
        ({"softcap": -30.0}, "softcap must be a finite number above 0"),
        ({"softcap": math.inf}, "softcap must be a finite number above 0"),
        ({"softcap": [30.0]}, "softcap must be a finite number above 0"),
        ({"sinks": torch.zeros(1)}, r"one logit per query head, \[4\], got a tensor \[1\]"),
        ({"sinks": torch.zeros(3)}, r"one logit per query head, \[4\]"),
        ({"sinks": torch.zeros(4, 3)}, r"one logit per query head, \[4\], got a tensor \[4, 3\]"),
        ({"sinks": torch.zeros(4, dtype=torch.long)}, r"floating tensor .*int64"),
        ({"sinks": [0.0] * 4}, r"floating tensor .*list"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks must be on the device of q"),
        ({"backend": None}, "backend must be a name"),
        ({"backend": ["reference"]}, "backend must be a name"),
        ({"kept": {}}, "kept must be a RotatedKeyCache"),
    ],
)
def test_arguments_that_cannot_be_used(changes: dict[str, object], message: str) -> None:
    with pytest.raises(posenc.InvalidInputError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("shape", "plan", "message"),
    [((1, 4, 3, 8), LENGTH_9, "differ"), ((2, 4, 3, 8), LENGTH_8, "the plan covers 8 tokens but there are 9 keys")],
)
def test_what_a_layer_hands_over_is_checked_before_a_backend_is_chosen(
    shape: tuple[int, ...], plan: PositionPlan, message: str
) -> None:
    k = torch.randn(2, 2, 9, 8)
    with pytest.raises(posenc.InvalidInputError, match=message):
        checked_backend("auto", AttentionCase(torch.randn(shape), k, k, None, [plan], None, None))


def test_backend_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(posenc.UnknownNameError, match="Did you mean 'cpu_flash'"):
        call(backend="cpu_flsh")
    monkeypatch.setenv("POSENC_TRACE", "1")
    with caplog.at_level(logging.INFO, logger="posenc"):
        call()
    assert "auto -> cpu_flash" in caplog.text
    monkeypatch.setenv("POSENC_BACKEND", "nonsense")
    with pytest.raises(posenc.UnknownNameError, match="nonsense"):
        call()
    monkeypatch.delenv("POSENC_BACKEND")
    from posenc.kernels.cpu.backend import CpuFlashBackend

    monkeypatch.setattr(CpuFlashBackend, "refuses", lambda *a: "it is out of order")
    with pytest.raises(posenc.BackendError, match="out of order"):
        call(backend="cpu_flash")
    call()  # auto goes on to the next one


def test_the_trace_says_what_was_chosen_and_why_nothing_better_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("posenc").setLevel(logging.NOTSET)
    call()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("POSENC_TRACE", "1")
    call(q=torch.randn(2, 4, 3, 8, requires_grad=True), mask=torch.ones(2, 1, 3, 9, dtype=torch.bool))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("posenc: backend auto -> cpu_flash: float32 on cpu, 3 queries over 9 keys, with gradient")
    assert "with a mask (" in line
    for better in ("xformers", "torch_flash"):
        assert f"{better}: it runs on cuda, not on cpu" in line
    assert "reference:" not in line
    call(softcap=2.0)
    assert "auto -> reference" in (line := capsys.readouterr().err)
    assert "cpu_flash: it computes no softcap" in line
    monkeypatch.setenv("POSENC_BACKEND", "reference")
    call()
    assert "backend reference, as asked" in capsys.readouterr().err
    with caplog.at_level(logging.INFO, logger="posenc"):
        call()  # an application that shows INFO gets it there, and once
    assert "as asked" in caplog.text
    assert capsys.readouterr().err == ""


def test_a_third_backend_needs_no_more_than_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written against the seam as it was published: attend, capabilities and a priority."""
    from posenc.kernels.reference import ReferenceBackend
    from posenc.testing.tensors import installed

    class Third(ReferenceBackend):
        name = "third"
        summary = "a third party's"
        priority = 12
        calls = 0

        def attend(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            Third.calls += 1
            return super().attend(*args, **kwargs)  # type: ignore[arg-type]

    with installed(Third()):
        call()
        assert Third.calls == 1
        Third.priority = 9  # after cpu_flash
        call()
        assert Third.calls == 1
