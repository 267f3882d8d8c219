"""Gradients of a backend's attention against those of the definition."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from posenc.testing.tensors import AttentionCall, difference
from posenc.testing.violation import violated


def with_gradients(call: AttentionCall) -> AttentionCall:
    """The call with leaf tensors that require gradients, in the same memory layout."""
    return replace(call, **{x: getattr(call, x).detach().requires_grad_() for x in ("q", "k", "v")})


def gradients(call: AttentionCall, out: Tensor, grad_out: Tensor, lse: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of query, key and value for one of the output and, where given, a weighted sum of finite logsumexps."""
    outputs, weights = [out], [grad_out.to(out.dtype)]
    if lse is not None and lse.requires_grad:
        outputs.append(lse.where(lse.isfinite(), 0.0))
        weights.append(torch.linspace(-1, 2, lse.numel(), device=lse.device).view(lse.shape).to(lse.dtype))
    return torch.autograd.grad(outputs, (call.q, call.k, call.v), weights, materialize_grads=True)


def weights_of(call: AttentionCall) -> Tensor:
    """A fixed gradient of the output with different elements."""
    shape = torch.Size((*call.q.shape[:3], call.v.shape[3]))
    return torch.linspace(-1, 1, shape.numel(), dtype=call.q.dtype, device=call.q.device).view(shape)


def check_gradients(
    what: str, name: str, call: AttentionCall, tolerance: float, *, lse: bool, grad_out: Tensor | None = None
) -> None:
    """Compare gradients of backend ``name`` with those of the definition; with ``lse``, through the logsumexp as well.

    ``tolerance`` is relative to the largest gradient if that is above 1.
    """
    call = with_gradients(call)
    grad_out = weights_of(call) if grad_out is None else grad_out
    results = [call.run(name) if lse else (call.output(name), None), call.expected()]
    actual, expected = (gradients(call, out, grad_out, values if lse else None) for out, values in results)
    for x, gradient, reference in zip("qkv", actual, expected, strict=True):
        off, largest = (float(error.max()) for error in (difference(gradient, reference), reference.abs()))
        if off > tolerance * max(1.0, largest):
            violated(
                f"{what}: the gradient of {x} is off by {off:.2g} (allowed {tolerance:.0e}), "
                f"but gradients are declared as exact. Case: {call}."
            )


def check_empty_row_gradients(name: str, call: AttentionCall) -> None:
    """Queries that attend no key must not put a NaN into any gradient."""
    call = with_gradients(call)
    for x, gradient in zip("qkv", gradients(call, call.output(name), weights_of(call)), strict=True):
        if not bool(gradient.isfinite().all()):
            violated(f"{name}: a query without a key puts a NaN or an infinity into the gradient of {x}.")
