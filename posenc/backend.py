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
        Exact gradients for query, key and value.
    masks : bool
        Accepts a bool mask [B, 1, Lq, Lk].
    softcap : bool
        Accepts ``softcap``: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    lse_gradients : bool
        The logsumexp carries exact gradients too, which attention sinks need in training, and whoever takes the
        logsumexp of tensors that require a gradient: there a backend without them is refused.
    logit_interpolation : bool
        Runs segments with ``interpolation="logits"``, as a backend does that hands it to ``rotary.tables``.
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
    """Runs plans. One instance is registered and shared, so it holds no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[BackendCapabilities]
    priority: ClassVar[int] = 0
    """``auto`` chooses the highest priority among the backends that can run a case: the fastest where that is measured.

    Ours, and between them room for yours: ``xformers`` 20, ``torch_flash`` 15, ``cpu_flash`` 10, ``triton`` 5
    (until a GPU has measured it; 25 for few queries), ``flash_attn_4`` 4 (likewise), ``reference`` -100.
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

        Tensors come in any layout: transposed, sliced with a step, or expanded, in every dimension. The batch is
        not empty, and ``scale`` is positive and finite. ``options`` holds ``softcap`` and ``kept`` where the
        capabilities name them and there are any, else nothing.

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
        """The same with a plan of its own for every batch row: row by row, unless a backend knows a faster way.

        ``options`` never holds ``kept`` here.
        """
        parts = []
        for row, plan in enumerate(plans):
            own = slice(row, row + 1)
            own_mask = None if mask is None else mask[own]
            case = (q_BHLD[own], k_BHLD[own], v_BHLD[own], plan, rotary)
            parts.append(self.attend(*case, scale=scale, mask=own_mask, **options))
        out_BHLD, lse_BHL = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return out_BHLD, lse_BHL

    def priority_for(self, q_BHLD: Tensor, k_BHLD: Tensor) -> int:
        """The priority for tensors of these shapes, where it is not the same for all: see :attr:`priority`."""
        return self.priority

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Why this case cannot run here, or None when it can.

        Layers of one forward whose tensors agree in shape, dtype, device and need of a gradient ask once.
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
    """True where autograd would follow what is computed from these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
