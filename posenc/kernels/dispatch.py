"""Attention of a plan on raw tensors: checks the case, chooses the backend, groups rows of a batch.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend, needs_gradient
from posenc.errors import BackendError, InvalidInputError
from posenc.kernels.arguments import check_choice, check_number, check_rotary, check_sinks, check_tensors, checked_plans
from posenc.kernels.autocast import as_autocast, without_autocast
from posenc.plan import PositionPlan
from posenc.plugins import backends
from posenc.rope import Rotary
from posenc.trace import trace, tracing

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
        number of keys, positions per frequency that are not one for each, or numbers that are none.
    BackendError
        If the chosen backend cannot run this case, or none can.
    UnknownNameError
        If no backend of that name is installed.
    """
    run = _attention
    if torch.compiler.is_compiling():
        disable: Any = torch.compiler.disable  # imports the compiler, which nobody else needs
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
    chosen = checked_backend(q, k, v, mask, backend, plans, softcap=softcap, sinks=sinks, return_lse=return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not q.shape[0]:
        out, lse = _of_no_rows(q, k, v)
    else:
        own = plans[0] if len({id(p) for p in plans}) == 1 else plans
        out, lse = attend(chosen, q, k, v, own, rotary, scale, mask, softcap=softcap, sinks=sinks, kept=kept)
    return (out, lse) if return_lse else out


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
    """Output and logsumexp of one plan, or one per row, on a backend that can run the case; sinks are added here.

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
    """Output and logsumexp of an empty batch, which no kernel need know; autograd follows them to the inputs."""
    nothing = q.sum() + k.sum() + v.sum()
    return nothing.expand(*q.shape[:3], v.shape[3]), nothing.float().expand(q.shape[:3])


def checked_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    name: str,
    plans: Sequence[PositionPlan],
    *,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool = False,
) -> AttentionBackend:
    """The backend for a case whose tensors and plans fit together."""
    check_tensors(q, k, v, mask)
    for own in plans:
        if own.total != k.shape[2]:
            raise InvalidInputError(
                f"the plan covers {own.total} tokens but there are {k.shape[2]} keys: build it with "
                f"strategy.plan(prompt, total={k.shape[2]})."
            )
    return choose_backend(q, k, v, mask, name, softcap=softcap, sinks=sinks, plans=plans, return_lse=return_lse)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    name: str,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plans: Sequence[PositionPlan] = (),
    return_lse: bool = False,
) -> AttentionBackend:
    """The named backend if it can run the case, or for ``"auto"`` the first in order of priority that can.

    ``POSENC_BACKEND`` names the default for ``"auto"``; ``POSENC_TRACE=1`` shows what was chosen, and why no other.
    """
    asked = name if name != "auto" else os.environ.get("POSENC_BACKEND", "auto")
    if asked != "auto":
        backend: AttentionBackend = backends()[asked].backend
        reason = _cannot_run(backend, q, k, v, mask, softcap, sinks, plans, return_lse)
        if reason is not None:
            raise BackendError(f"backend {asked!r} cannot run this case: {reason}. Choose another, or backend='auto'.")
        if tracing():
            trace("backend %s, as asked: %s", asked, _case(q, k, v, mask))
        return backend
    refusals: list[str] = []
    for info in sorted(backends().values(), key=lambda info: -info.backend.priority_for(q, k)):
        reason = _cannot_run(info.backend, q, k, v, mask, softcap, sinks, plans, return_lse)
        if reason is None:
            if tracing():
                why = "; ".join(refusals) or "nothing comes before it"
                trace("backend auto -> %s: %s (%s)", info.name, _case(q, k, v, mask), why)
            chosen: AttentionBackend = info.backend
            return chosen
        refusals.append(f"{info.name}: {reason}")
    raise BackendError(f"no installed backend can run this case. {'; '.join(refusals)}.")


def _case(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """What the choice depends on, in words."""
    dtype = str(q.dtype).removeprefix("torch.")
    gradient = "with" if needs_gradient(q, k, v) else "no"
    masked = "no" if mask is None else "with a"
    return (
        f"{dtype} on {q.device.type}, {q.shape[2]} queries over {k.shape[2]} keys, {gradient} gradient, {masked} mask"
    )


def _cannot_run(
    backend: AttentionBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    plans: Sequence[PositionPlan],
    return_lse: bool,
) -> str | None:
    """Why a backend cannot run the case, or None when it can."""
    try:
        reason = backend.refuses(q, k, v, mask)
    except Exception as error:  # a broken backend must not keep ``auto`` from the others
        return f"it fails to say whether it can: {type(error).__name__}: {error}"
    if reason is None and not backend.capabilities.logit_interpolation and any(p.interpolates_logits for p in plans):
        return "it does not interpolate logits"
    return reason or _lacks(backend, q, k, softcap, sinks, return_lse)


def _lacks(
    backend: AttentionBackend, q: Tensor, k: Tensor, softcap: float | None, sinks: Tensor | None, return_lse: bool
) -> str | None:
    if softcap is not None and not backend.capabilities.softcap:
        return "it computes no softcap"
    if backend.capabilities.lse_gradients:
        return None
    if sinks is not None and needs_gradient(q, k, sinks):
        return "it has no backward pass for attention sinks"
    if return_lse and needs_gradient(q, k):
        return "it has no gradient of the logsumexp that return_lse=True asks for"
    return None
