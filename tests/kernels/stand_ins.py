"""Dense CPU versions of the CUDA libraries' operators, as strict about their arguments as the real ones.

Shape letters: B batch, H heads, G key/value heads, R queries and K keys of one call, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from posenc.backend import BackendCapabilities
from posenc.kernels.windowed.flash_attn_4 import FlashAttention4Backend
from posenc.kernels.windowed.torch_flash import TorchFlashBackend
from posenc.kernels.windowed.xformers import XformersBackend
from posenc.kernels.windowed.xformers_library import find_fmha

fmha: Any = find_fmha()[0]

HERE = ("device=cpu", "operator wasn't built", "bf16 is only supported on A100+")
"""How xformers' refusals begin that apply to every call on this machine."""

CUTLASS_LSE = 32
"""CUTLASS rounds the length of its logsumexp up to a multiple of this."""


def assert_loadable(*tensors: Tensor) -> None:
    """Check that every row begins where flash attention and CUTLASS can load 16 bytes at a time."""
    for x in tensors:
        starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
        assert x.stride(-1) == 1
        assert not any(start % 16 for start in starts), starts


def dense(q_BRGHD: Tensor, k_BKGHD: Tensor, v_BKGHD: Tensor, bias_RK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention with an additive mask; without keys the logsumexp is ``+inf``, as in flash attention."""
    q, k, v = q_BRGHD.double(), k_BKGHD.double(), v_BKGHD.double()
    logits = torch.einsum("brghd,bkghd->bghrk", q, k) * scale + bias_RK.double()
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0.0) if (lse == -torch.inf).any() else logits.softmax(-1)
    out = torch.einsum("bghrk,bkghd->brghd", weights, v)
    return out.to(q_BRGHD.dtype), lse.masked_fill(lse == -torch.inf, torch.inf).float()


def xformers_call(op: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float, partial: bool) -> Any:
    """Compute one call, or fail for every reason that xformers would have on a capable GPU."""
    inputs = fmha.common.Inputs(q, k, v, bias, scale=scale, is_partial=partial)
    inputs.validate_inputs()
    reasons = [reason for reason in op.not_supported_reasons(inputs) if not reason.startswith(HERE)]
    assert not reasons, reasons
    assert_loadable(q, k, v)
    shape = (q.shape[1], k.shape[1])
    additive = torch.zeros(shape) if bias is None else bias.materialize(shape)
    return dense(q, k, v, additive, scale)


def partial(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, *, scale: float) -> tuple[Tensor, Tensor]:
    return xformers_call(fmha.flash.FwOp, q, k, v, attn_bias, scale, True)


def requires_grad(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, *, scale: float, op: Any) -> tuple[Tensor, Tensor]:
    assert op is fmha.cutlass.FwOp
    out, lse = xformers_call(op, q, k, v, attn_bias, scale, False)
    if q.shape[3] == 1:
        lse = lse.transpose(1, 2)  # the shape that xformers returns for groups of one head
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % CUTLASS_LSE), value=torch.inf)


def merge_attentions(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the formula of xformers' documentation, on shapes [B, R, H, D] and [B, H, R]."""
    assert len(outs) == len(lses) > 1
    for out, lse in zip(outs, lses, strict=True):
        assert out.shape == outs[0].shape
        assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
    lse_NBHR = torch.stack(lses).double()
    weights = lse_NBHR.softmax(0).transpose(2, 3)[..., None]
    return (torch.stack(outs).double() * weights).sum(0).to(outs[0].dtype), lse_NBHR.logsumexp(0).float()


FMHA = SimpleNamespace(
    attn_bias=fmha.attn_bias,
    cutlass=fmha.cutlass,
    memory_efficient_attention_partial=partial,
    memory_efficient_attention_forward_requires_grad=requires_grad,
    merge_attentions=merge_attentions,
)


def on_cpu(backend: type[Any]) -> BackendCapabilities:
    able: BackendCapabilities = replace(backend.capabilities, devices=("cpu",))
    return able


class SimulatedXformers(XformersBackend):
    name = "simulated_xformers"
    capabilities = on_cpu(XformersBackend)
    fmha = FMHA

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        return None


def through_window(
    q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention through a window around the diagonal that ends at the last key of the last query."""
    rows, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    groups = k.shape[2]
    shared = q.shape[2] // groups
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, shared, -1) for x in (k, v))
    bias = torch.zeros(rows, keys).masked_fill(~seen, -torch.inf)
    out, lse = dense(q.unflatten(2, (groups, shared)), k, v, bias, scale)
    return out.flatten(2, 3), lse.flatten(1, 2)


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_q: None,
    cum_k: None,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """Stand in for ``aten::_flash_attention_forward``; the real operator's meta kernel checks shapes and schema."""
    arguments = (cum_q, cum_k, max_q, max_k, dropout, causal, debug)
    windows = {"scale": scale, "window_size_left": window_size_left, "window_size_right": window_size_right}
    meta = torch.ops.aten._flash_attention_forward(*(x.to("meta") for x in (q, k, v)), *arguments, **windows)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert_loadable(q, k, v)
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    left, right = (None if width < 0 else width for width in (window_size_left, 0 if causal else window_size_right))
    out, lse = through_window(q, k, v, left, right, scale)
    assert (out.shape, lse.shape) == (meta[0].shape, meta[1].shape)
    return out, lse, torch.empty(2), torch.empty(()), torch.empty(())


class SimulatedTorchFlash(TorchFlashBackend):
    name = "simulated_torch_flash"
    capabilities = on_cpu(TorchFlashBackend)

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        return None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    window_size: tuple[int | None, int | None],
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Stand in for ``flash_attn.cute.flash_attn_func`` of FlashAttention-4, with its assertions on Hopper."""
    (batch, _, heads, width), (_, keys, groups, _) = q.shape, k.shape
    assert k.shape == v.shape == (batch, keys, groups, width)
    assert heads % groups == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert 8 <= width <= 256
    assert width % 8 == 0
    assert isinstance(softmax_scale, float)
    assert all(width is None or (isinstance(width, int) and width >= 0) for width in window_size)
    assert return_lse  # without it the logsumexp is None
    assert_loadable(q, k, v)
    return through_window(q, k, v, *window_size, softmax_scale)


class SimulatedFlashAttention4(FlashAttention4Backend):
    name = "simulated_flash_attn_4"
    capabilities = on_cpu(FlashAttention4Backend)
    forward = staticmethod(flash_attn_func)

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        return None

    def unfit(self, device: torch.device, width: int) -> str | None:
        return None


WINDOWED = (SimulatedXformers(), SimulatedTorchFlash(), SimulatedFlashAttention4())
