"""What reaches the attention function of one layer, and what takes it there.

Shape letters: B batch, H heads, L new tokens, K cache slots handed to the layer, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from posenc.hf.stock import StockAttention


@dataclass(frozen=True)
class LayerCall:
    """One call of the attention function, with raw queries and keys.

    Parameters
    ----------
    module : Module
        The attention module.
    q_BHLD, k_BHKD, v_BHKD : Tensor
        Queries of the new tokens, and the keys and values that the cache hands over.
    mask : Tensor or None
        The mask that transformers made for the layer.
    scaling : float or None
        Factor on the logits, ``head_dim ** -0.5`` where it is None.
    dropout : float
        Attention dropout.
    options : mapping
        Everything else that the model passes to its attention function.
    """

    module: nn.Module
    q_BHLD: Tensor
    k_BHKD: Tensor
    v_BHKD: Tensor
    mask: Tensor | None
    scaling: float | None
    dropout: float
    options: Mapping[str, Any]

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return float(self.q_BHLD.shape[-1] ** -0.5) if self.scaling is None else self.scaling

    def run(self, stock: StockAttention, q_BHLD: Tensor, k_BHKD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own attention function on queries and keys that were rotated, and on the call's values."""
        return stock(
            self.module,
            q_BHLD,
            k_BHKD,
            self.v_BHKD,
            self.mask,
            dropout=self.dropout,
            scaling=self.scaling,
            **self.options,
        )


class LayerStep(Protocol):
    """What the decoder's hook hands down to every attention layer of one forward."""

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer; output [B, L, H, D] and no weights, as transformers expects."""
        ...
