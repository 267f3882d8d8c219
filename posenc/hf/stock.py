"""The attention functions of unpatched models, and the registries in which transformers finds functions by name.

Under the identity plan a step calls the model's own function from here, so its result is bit-equal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posenc.errors import UnsupportedModelError

STOCK_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations of transformers that posenc can be applied on top of."""

StockAttention = Callable[..., tuple[Tensor, Tensor | None]]


def stock_attention(name: str, module: nn.Module) -> StockAttention:
    """Return the attention function that a model runs when it is not patched.

    Parameters
    ----------
    name : str
        Attention implementation as transformers names it.
    module : Module
        A module of the model; the eager function is the one in the Python module that defines its class.

    Raises
    ------
    UnsupportedModelError
        If the family has no eager attention function.
    """
    if name == "eager":
        sources = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
        functions = (getattr(source, "eager_attention_forward", None) for source in sources)
        eager: Any = next((function for function in functions if function is not None), None)
        if eager is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function: load it with sdpa.")
        return EagerAttention(eager)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: StockAttention = ALL_ATTENTION_FUNCTIONS[name]
    return function


def register(name: str, attention: StockAttention, mask: Callable[..., Any] | None = None) -> None:
    """Add an attention function and its mask function (by default that of sdpa) to transformers' registries.

    A name that is registered already gets the new functions.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask or sdpa_mask)


@dataclass(frozen=True)
class EagerAttention:
    """A family's eager attention, called with the bool masks that a patched model makes.

    Parameters
    ----------
    function : callable
        The family's eager attention function, which takes masks that are added to the logits.
    """

    function: StockAttention

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if mask is None and kwargs.get("is_causal") is not False:
            q_len, k_len = q.shape[2], k.shape[2]
            mask = torch.ones((q_len, k_len), dtype=torch.bool, device=q.device)[None, None]
            mask = mask if q_len == 1 else mask.tril()
        if mask is not None and mask.dtype == torch.bool:
            blocked = torch.finfo(q.dtype).min
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, blocked)
        return self.function(module, q, k, v, mask, **kwargs)
