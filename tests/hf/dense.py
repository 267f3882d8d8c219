"""A dense float64 decoder written from the formulas, with which every patched model is compared.

It shares no code with posenc: logits come directly from the relative positions of a plan,
``Re(sum_c q_c conj(k_c) exp(i theta_c rel))``, without rotating queries or keys.

Shape letters: L tokens, H heads, D head_dim, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """A plan as dense arrays: relative positions [L, L] or [L, L, F], a scale [L], frequencies per query.

    Where ``mixed`` [L, L] is True, a logit is interpolated between the two neighbouring integer relative positions.
    """

    relative: np.ndarray
    scale: np.ndarray
    inv_freq: Tensor  # [L, F]
    factor: Tensor  # [L]
    mixed: np.ndarray | bool = False


def norm(x: Tensor, module: Any) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return scaled * module.weight.double()


def linear(x: Tensor, module: Any) -> Tensor:
    bias = 0 if module.bias is None else module.bias.double()
    return x @ module.weight.double().T + bias


def attend(attention: Any, x: Tensor, at: Positions, window: int | None) -> Tensor:
    length, dim = x.shape[0], attention.head_dim
    q, k, v = (linear(x, p).view(length, -1, dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        q, k = norm(q, attention.q_norm), norm(k, attention.k_norm)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    half = dim // 2
    q_c, k_c = torch.complex(q[..., :half], q[..., half:]), torch.complex(k[..., :half], k[..., half:])
    relative = torch.from_numpy(at.relative.copy())
    relative = relative if relative.ndim == 3 else relative[..., None]
    whole = relative.nan_to_num().floor()
    share = (relative.nan_to_num() - whole) * torch.as_tensor(at.mixed)[..., None]
    below = torch.where(share > 0, whole, relative.nan_to_num())
    one, inv_freq = torch.ones(()).double(), at.inv_freq[:, None].double()
    turn = (1 - share) * torch.polar(one, below * inv_freq) + share * torch.polar(one, (whole + 1) * inv_freq)
    logits = torch.einsum("ihf,jhf,ijf->hij", q_c, k_c.conj(), turn).real
    scale = at.factor.double() ** 2 * torch.from_numpy(at.scale.copy())
    logits = logits * attention.scaling * scale[:, None]
    seen = ~relative[..., 0].isnan()
    if window is not None:
        index = torch.arange(length)
        seen &= index[:, None] - index < window
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return linear(torch.einsum("hij,jhd->ihd", weights, v).reshape(length, -1), attention.o_proj)


def dense_logits(model: Any, tokens: Tensor, at: Positions | Sequence[Positions]) -> Tensor:
    """Return float64 logits [L, vocab] of one unpadded row, given positions of all layers or of each layer."""
    config = model.config
    types = getattr(config, "layer_types", None)
    x = model.model.embed_tokens.weight.double()[tokens]
    for index, layer in enumerate(model.model.layers):
        sliding = types[index] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None
        window = config.sliding_window if sliding else None
        positions = at if isinstance(at, Positions) else at[index]
        x = x + attend(layer.self_attn, norm(x, layer.input_layernorm), positions, window)
        mlp, inner = layer.mlp, norm(x, layer.post_attention_layernorm)
        gate = torch.nn.functional.silu(linear(inner, mlp.gate_proj)) * linear(inner, mlp.up_proj)
        x = x + linear(gate, mlp.down_proj)
    return linear(norm(x, model.model.norm), model.lm_head).detach()
