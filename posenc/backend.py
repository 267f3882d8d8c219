"""The backend seam: run one plan on raw query, key and value tensors.

Shape letters: B batch, H heads (query heads or key/value heads), L tokens, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from posenc.plan import PositionPlan
from posenc.rope import Rotary


@dataclass(frozen=True)
class BackendCapabilities:
    """What a backend can run; the contract suite tests exactly this.

    Parameters
    ----------
    devices : tuple of str
        Device types, such as ``("cpu",)``.
    dtypes : tuple of torch.dtype
        Input dtypes.
    gradients : bool
        Gives exact gradients for query, key and value.
    masks : bool
        Accepts a bool mask [B, 1, Lq, Lk].
    softcap : bool
        Accepts ``softcap``: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    lse_gradients : bool
        Gives exact gradients for the logsumexp too. Attention sinks need them in training, and so does a caller who
        takes the logsumexp of tensors that require a gradient: there a backend without them is refused.
    logit_interpolation : bool
        Runs segments with ``interpolation="logits"``: it passes a segment's interpolation on to ``rotary.tables``.
    keeps_keys : bool
        Accepts ``kept``, a :class:`~posenc.kernels.rotated_key_cache.RotatedKeyCache`, and leaves the rotated keys
        there for the next step.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    gradients: bool
    masks: bool
    softcap: bool = False
    lse_gradients: bool = False
    logit_interpolation: bool = False
    keeps_keys: bool = False


class AttentionBackend(ABC):
    """Runs plans. One instance is registered and shared by all models and threads, so it holds no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[BackendCapabilities]
    priority: ClassVar[int] = 0
    """``auto`` takes the backend of the highest priority that can run a case: the fastest, where that is measured.

    The built-in ones leave room between them: ``xformers`` 20, ``torch_flash`` 15, ``cpu_flash`` 10, ``triton`` 5
    (until it is measured on a GPU; 25 for few queries), ``flash_attn_4`` 4 (likewise), ``reference`` -100.
    """

    @abstractmethod
    def attend(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        v_BHLD: Tensor,
        plan: PositionPlan,
        rotary: Rotary,
        *,
        scale: float,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the last ``Lq`` of ``plan.total == Lk`` positions over raw keys.

        Parameters
        ----------
        q_BHLD : float [B, Hq, Lq, D]
            Queries, not rotated. Tensors come in any layout: transposed, sliced with a step, or expanded, in every
            dimension. The batch is not empty.
        k_BHLD, v_BHLD : float [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv]
            Keys (not rotated) and values.
        plan : PositionPlan
            The same object for every layer, so it can keep what is derived from it.
        rotary : Rotary
            Frequencies and layout.
        scale : float
            Factor on the logits, positive and finite.
        mask : bool [B, 1, Lq, Lk] or None
            True where a pair may attend, on top of the plan.
        **options
            ``softcap`` and ``kept``, where the capabilities name them and there are any; else nothing.

        Returns
        -------
        (Tensor, Tensor)
            Output [B, Hq, Lq, Dv] in the input dtype and natural-log logsumexp, float32 [B, Hq, Lq];
            a query that attends nothing gets zeros and ``-inf``.
        """

    def attend_rows(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        v_BHLD: Tensor,
        plans: Sequence[PositionPlan],
        rotary: Rotary,
        *,
        scale: float,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`attend` with a plan for every batch row: row by row, unless a backend knows a faster way.

        ``options`` never holds ``kept`` here.
        """
        results = []
        for row, plan in enumerate(plans):
            at = slice(row, row + 1)
            row_mask = None if mask is None else mask[at]
            results.append(
                self.attend(q_BHLD[at], k_BHLD[at], v_BHLD[at], plan, rotary, scale=scale, mask=row_mask, **options)
            )
        out_BHLD, lse_BHL = (torch.cat(tensors) for tensors in zip(*results, strict=True))
        return out_BHLD, lse_BHL

    def priority_for(self, q_BHLD: Tensor, k_BHLD: Tensor) -> int:
        """The priority for tensors of these shapes, by default :attr:`priority`."""
        return self.priority

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Why this case cannot run here, in words that finish a message, or None when it can.

        It is asked once for all layers of a forward whose tensors agree in shape, dtype, device and need of a gradient.
        """
        able = self.capabilities
        if q_BHLD.device.type not in able.devices:
            return f"it runs on {', '.join(able.devices)}, not on {q_BHLD.device.type}"
        if q_BHLD.dtype not in able.dtypes:
            return f"it does not compute in {q_BHLD.dtype}"
        if mask is not None and not able.masks:
            return "it takes no mask"
        if needs_gradient(q_BHLD, k_BHLD, v_BHLD) and not able.gradients:
            return "it has no backward pass"
        return None


def needs_gradient(*tensors: Tensor) -> bool:
    """True where autograd follows what is computed from these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
