"""Attention of a plan on raw tensors: check the arguments, choose the backend, run it.

::

    attention --- arguments.py: types, shapes, values      (a layer of a model calls checked_backend and attend)
        |
    checked_backend --- choice.py: the named backend, or the one of highest priority that can run the case
        |
    attend --- AttentionBackend.attend: one plan for all batch rows; attend_rows: one per row

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend
from posenc.kernels.arguments import (
    check_choice,
    check_lengths,
    check_number,
    check_rotary,
    check_sinks,
    check_tensors,
    checked_plans,
)
from posenc.kernels.autocast import as_autocast, without_autocast
from posenc.kernels.choice import AttentionCase, choose_backend
from posenc.plan import PositionPlan
from posenc.rope import Rotary

if TYPE_CHECKING:
    from posenc.kernels.rotated_key_cache import RotatedKeyCache

OUTSIDE = "posenc reads plans in Python: torch.compile breaks its graph around posenc.attention"
"""Why a compiled function that calls :func:`attention` is several graphs."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan | Sequence[PositionPlan],
    rotary: Rotary,
    *,
    backend: str = "auto",
    scale: float | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kept: RotatedKeyCache | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the positions of a plan.

    Parameters
    ----------
    q : float [B, Hq, Lq, D]
        Queries, not rotated: the last ``Lq`` of ``plan.total`` positions.
    k, v : float [B, Hkv, Lk, D]
        Keys (not rotated) and values; ``Hq % Hkv == 0`` and ``Lk == plan.total``.
    plan : PositionPlan or sequence of PositionPlan
        One plan, or one per batch row.
    rotary : Rotary
        Frequencies and layout.
    backend : str
        A name from ``posenc.backends()``, or ``"auto"``.
    scale : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    mask : bool [B, 1, Lq, Lk], optional
        True where a pair may attend, on top of the plan.
    return_lse : bool
        Return the natural-log logsumexp as well.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    sinks : float [Hq], optional
        One more logit per head that every query attends to and that carries no value (GPT-OSS).
    kept : RotatedKeyCache, optional
        Rotated keys of the step before, for decoding: backends that can use them rotate new keys only.
        Ignored where every row has its own plan.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output [B, Hq, Lq, Dv] in the dtype of ``q``; logsumexp float32 [B, Hq, Lq]. Under ``torch.autocast`` query,
        key and value are cast to its dtype first, as ``F.scaled_dot_product_attention`` casts them.

    Raises
    ------
    InvalidInputError
        If an argument is not what is described here: a wrong type, shapes that do not fit together, a plan for another
        number of keys, positions per frequency of which there is not one for each, or numbers that are not finite.
    BackendError
        If the chosen backend cannot run this case, or none can.
    UnknownNameError
        If no backend of that name is installed.
    """
    run = _attention
    if torch.compiler.is_compiling():
        disable: Any = torch.compiler.disable  # imports the compiler, which nothing else here needs
        run = disable(_attention, reason=OUTSIDE)
    return run(q, k, v, plan, rotary, backend, scale, mask, return_lse, softcap, sinks, kept)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan | Sequence[PositionPlan],
    rotary: Rotary,
    backend: str,
    scale: float | None,
    mask: Tensor | None,
    return_lse: bool,
    softcap: float | None,
    sinks: Tensor | None,
    kept: RotatedKeyCache | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same, never traced by torch.compile."""
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = as_autocast(q, k, v)
    check_tensors(q, k, v, mask)
    plans = checked_plans(plan, q.shape[0])
    check_rotary(rotary, plans, q)
    check_number("scale", scale)
    check_number("softcap", softcap, positive=True)
    check_sinks(sinks, q)
    check_choice(backend, kept)
    check_lengths(plans, k)
    chosen = choose_backend(backend, AttentionCase(q, k, v, mask, plans, softcap, sinks, return_lse))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not q.shape[0]:
        out, lse = _of_no_rows(q, k, v)
    else:
        plan = plans[0] if len({id(row_plan) for row_plan in plans}) == 1 else plans
        out, lse = attend(chosen, q, k, v, plan, rotary, scale, mask, softcap=softcap, sinks=sinks, kept=kept)
    return (out, lse) if return_lse else out


def checked_backend(name: str, case: AttentionCase) -> AttentionBackend:
    """The backend for a case, once its tensors and plans are known to fit together.

    Parameters
    ----------
    name : str
        A name from ``posenc.backends()``, or ``"auto"``.

    Raises
    ------
    InvalidInputError
        If tensors or plans do not fit together.
    BackendError
        If the named backend cannot run this case, or none can.
    """
    check_tensors(case.q, case.k, case.v, case.mask)
    check_lengths(case.plans, case.k)
    return choose_backend(name, case)


def attend(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan | Sequence[PositionPlan],
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    kept: RotatedKeyCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of a backend that can run the case; sinks are added here.

    Backends get a positive scale: kernels that hide keys by ``-inf`` before they multiply would make NaN of any other.
    """
    if scale <= 0:
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    with without_autocast(q.device):
        if isinstance(plan, PositionPlan):
            if kept is not None and backend.capabilities.keeps_keys:
                options["kept"] = kept
            out, lse = backend.attend(q, k, v, plan, rotary, scale=scale, mask=mask, **options)
        else:
            out, lse = backend.attend_rows(q, k, v, plan, rotary, scale=scale, mask=mask, **options)
        if sinks is not None:
            sink_H1 = sinks.float()[:, None]
            out = (out * torch.sigmoid(lse - sink_H1)[..., None]).to(out.dtype)
            lse = torch.logaddexp(lse, sink_H1)
    return out, lse


def _of_no_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of an empty batch, which kernels never see; autograd follows them to the inputs."""
    nothing = q.sum() + k.sum() + v.sum()
    return nothing.expand(*q.shape[:3], v.shape[3]), nothing.float().expand(q.shape[:3])
