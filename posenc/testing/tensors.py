"""One attention call of a backend, what it must return, and which mistake explains a wrong result.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.kernels.dispatch import attention
from posenc.plan import PositionPlan
from posenc.plugins import backend_info, backends
from posenc.rope import Rotary
from posenc.testing.definition import attend_by_logits, logits_by_definition
from posenc.testing.generators import random_plans
from posenc.testing.violation import violated

HEADS = ((4, 2), (4, 4), (6, 2), (8, 1), (3, 3))
LSE = 2e-5
"""Smallest tolerance of a logsumexp, which is float32 for every input dtype."""


@dataclass(frozen=True, repr=False)
class AttentionCall:
    """The arguments of one call of ``posenc.attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: PositionPlan
    rotary: Rotary
    scale: float
    mask: Tensor | None = None
    softcap: float | None = None

    def run(self, name: str) -> tuple[Tensor, Tensor]:
        """The backend's output and logsumexp."""
        result = self._attention(name, return_lse=True)
        assert isinstance(result, tuple)
        return result

    def output(self, name: str) -> Tensor:
        """The backend's output, called without ``return_lse``."""
        result = self._attention(name, return_lse=False)
        assert isinstance(result, Tensor)
        return result

    def _attention(self, name: str, *, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": self.scale, "mask": self.mask, "softcap": self.softcap}
        return attention(self.q, self.k, self.v, self.plan, self.rotary, backend=name, return_lse=return_lse, **options)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Output and logsumexp by definition, float64."""
        return attend_by_logits(self.logits(), self.v)

    def logits(self, **changes: Any) -> Tensor:
        """Logits by definition, of this call with some fields changed."""
        call = replace(self, **changes)
        return logits_by_definition(
            call.q, call.k, call.plan, call.rotary, scale=call.scale, mask=call.mask, softcap=call.softcap
        )

    def __repr__(self) -> str:
        return f"AttentionCall({self})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # hypothesis prints the failing call, and its tensors would hide the message
        printer.text(repr(self))

    def __str__(self) -> str:
        parts = [
            f"{self.q.shape[1]} query heads, {self.k.shape[1]} key heads, Lq={self.q.shape[2]}, Lk={self.k.shape[2]}",
            str(self.q.dtype).removeprefix("torch."),
            f"segments {[segment.name for segment in self.plan.segments]}",
            f"scale {self.scale:.3g}",
            f"{self.rotary.style} rotation of channels {self.rotary.rotated}",
        ]
        if self.plan.query_scale is not None:
            parts.append("a query_scale")
        if self.mask is not None:
            parts.append("a mask")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap}")
        return ", ".join(parts)


@contextmanager
def installed(backend: AttentionBackend) -> Iterator[str]:
    """Register the backend under its name in ``posenc.backends()`` until the block ends, installed or not."""
    registry = backends()
    before = registry.get(backend.name)
    registry[backend.name] = backend_info(backend, "the distribution under test")
    try:
        yield backend.name
    finally:
        if before is None:
            del registry[backend.name]
        else:
            registry[backend.name] = before


def tensors(
    plan: PositionPlan,
    q_len: int,
    heads: tuple[int, int],
    dim: int,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values for the last ``q_len`` tokens of a plan."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, h, n, dim, generator=generator).to(dtype).to(device)
        for h, n in ((heads[0], q_len), (heads[1], plan.total), (heads[1], plan.total))
    )
    return q, k, v


@st.composite
def random_calls(
    draw: st.DrawFn,
    *,
    dim: int,
    able: BackendCapabilities,
    dtype: torch.dtype,
    device: str,
    max_total: int = 70,
) -> AttentionCall:
    """Random plans, heads, lengths, rotations and, if they are declared, masks and softcaps."""
    width = draw(st.sampled_from([dim, dim // 2])) // 2 * 2
    plan = draw(random_plans(max_total, frequencies=width // 2, interpolated=able.logit_interpolation))
    q_len = max(1, round(draw(st.floats(0, 1)) * plan.total))
    seed = draw(st.integers(0, 3))
    start = draw(st.sampled_from([0, dim - width]))
    rotary = Rotary.from_theta(
        1e3,
        width,
        attention_scaling=draw(st.sampled_from([1.0, 1.1])),
        style=draw(st.sampled_from(["half", "interleaved"])),
        channels=(start, start + width),
    )
    mask = None
    if able.masks and draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.rand(2, 1, q_len, plan.total, generator=generator) < 0.4).to(device)
    q, k, v = tensors(plan, q_len, draw(st.sampled_from(HEADS)), dim, dtype=dtype, device=device, seed=seed)
    softcap = draw(st.sampled_from([None, 1.5])) if able.softcap else None
    return AttentionCall(q, k, v, plan, rotary, draw(st.sampled_from([dim**-0.5, 0.7])), mask, softcap)


def check_result(name: str, call: AttentionCall, out: Tensor, lse: Tensor, tolerance: float) -> None:
    """Compare output and logsumexp with the definition, dtype and shape included."""
    expected_out, expected_lse = call.expected()
    if out.shape != expected_out.shape or out.dtype != call.q.dtype:
        violated(
            f"{name}: the output is {out.dtype} {list(out.shape)}, "
            f"and should be {call.q.dtype} {list(expected_out.shape)}. Case: {call}."
        )
    if lse.shape != expected_lse.shape or lse.dtype != torch.float32:
        violated(
            f"{name}: the logsumexp is {lse.dtype} {list(lse.shape)}, "
            f"and should be torch.float32 {list(expected_lse.shape)}. Case: {call}."
        )
    wrong = {
        "output": (difference(out, expected_out).amax(-1), tolerance),
        "logsumexp": (difference(lse, expected_lse), max(tolerance, LSE)),
    }
    for what, (off, allowed) in wrong.items():
        if bool((off > allowed).any()):
            b, h, row = (int(x) for x in (off > allowed).nonzero()[0])
            i = call.plan.total - call.q.shape[2] + row
            explanation = _explanation(call, out, lse, (b, h, row), allowed)
            violated(
                f"{name}: the {what} differs from the definition at batch {b}, head {h}, query i={i} by "
                f"{float(off[b, h, row]):.2g} (allowed {allowed:.0e}).{explanation} "
                f"Case: {call}."
            )


def difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Absolute difference in float64; equal infinities differ by 0, NaN by infinity."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return torch.where(actual == expected, 0.0, (actual - expected).abs().nan_to_num(torch.inf))


def _explanation(call: AttentionCall, out: Tensor, lse: Tensor, at: tuple[int, int, int], tolerance: float) -> str:
    """The simple mistake that would give this result, as a sentence; empty if there is none."""
    variants: dict[str, dict[str, Any]] = {}
    if call.mask is not None:
        variants["the mask were ignored"] = {"mask": None}
    if call.softcap is not None:
        variants["softcap were ignored"] = {"softcap": None}
    if call.plan.query_scale is not None:
        variants["query_scale were forgotten"] = {"plan": replace(call.plan, query_scale=None)}
    if call.rotary.attention_scaling != 1:
        variants["attention_scaling were forgotten"] = {"rotary": replace(call.rotary, attention_scaling=1.0)}
    if call.plan.interpolates_logits:
        whole = tuple(replace(s, interpolation="positions") for s in call.plan.segments)
        variants["positions were interpolated, not logits"] = {"plan": replace(call.plan, segments=whole)}
    variants["scale were head_dim ** -0.5"] = {"scale": call.q.shape[-1] ** -0.5}
    variants["scale were 1"] = {"scale": 1.0}
    for number, segment in enumerate(call.plan.segments):
        rest = call.plan.segments[:number] + call.plan.segments[number + 1 :]
        variants[f"segment {segment.name!r} were left out"] = {"plan": replace(call.plan, segments=rest)}
    for what, changes in variants.items():
        if _fits(call.logits(**changes), call.v, out, lse, tolerance):
            return f" It is what it would be if {what}."
    b, h, row = at
    logits = call.logits()[b : b + 1, h : h + 1, row : row + 1]
    i, group = call.plan.total - call.q.shape[2] + row, call.q.shape[1] // call.k.shape[1]
    value = call.v[b : b + 1, h // group : h // group + 1]
    result = out[b : b + 1, h : h + 1, row : row + 1], lse[b : b + 1, h : h + 1, row : row + 1]
    for j in range(i + 1):
        for what, change in (("were not attended", float("-inf")), ("were attended twice", 0.6931471805599453)):
            other = logits.clone()
            other[..., j] += change
            if _fits(other, value, *result, tolerance):
                return f" It is what it would be if pair (i={i}, j={j}) {what}."
    if _fits(call.logits(), call.v, out, None, tolerance):
        return " The output is right."
    return ""


def _fits(logits: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tolerance: float) -> bool:
    expected_out, expected_lse = attend_by_logits(logits, v)
    fits = bool((difference(out, expected_out) <= tolerance).all())
    return fits and (lse is None or bool((difference(lse, expected_lse) <= max(tolerance, LSE)).all()))


def check_empty_rows(name: str, call: AttentionCall, rows: slice, why: str) -> None:
    """The queries of ``rows``, which attend nothing, get zeros and ``-inf``."""
    out, lse = call.run(name)
    if not bool((out[:, :, rows] == 0).all()):
        violated(f"{name}: {why} query i={rows.start}, so its output must be zeros. Case: {call}.")
    if not bool((lse[:, :, rows] == float("-inf")).all()):
        violated(f"{name}: {why} query i={rows.start}, so its logsumexp must be -inf. Case: {call}.")
