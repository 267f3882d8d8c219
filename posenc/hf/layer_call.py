"""One call of a layer's attention function, and the interface of what computes it.

transformers calls the registered attention function in every layer (``posenc/hf/hooks.py``). The function packs its
arguments into a :class:`LayerCall` and passes it to the forward's :class:`LayerStep`: a ``Step``, a ``CompiledStep``, a
``PagedStep``, or the probe's ``Recorder``.

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
    """One call of the attention function, with raw (not rotated) queries and keys.

    Parameters
    ----------
    module : Module
        The attention module.
    q_BHLD, k_BHKD, v_BHKD : Tensor
        Queries of the new tokens, and the keys and values that the cache hands over.
    mask : Tensor or None
        The mask that transformers made for the layer.
    scaling : float or None
        Factor on the logits; None stands for ``head_dim ** -0.5``.
    dropout : float
        Probability of attention dropout.
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
        """Run the model's own attention function on rotated queries and keys and the values of the call.

        Parameters
        ----------
        stock : callable
            The model's own attention function.
        q_BHLD, k_BHKD : Tensor
            Rotated queries and keys.

        Returns
        -------
        output : Tensor [B, L, H, D]
            As transformers expects it.
        weights : Tensor or None
            Attention weights, if the function returns them.
        """
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
    """What the decoder's hook passes to every attention layer of one forward."""

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, L, H, D] of a layer's attention, and weights if the model's own function makes some."""
        ...
