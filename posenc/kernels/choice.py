"""Choose the backend that runs a case: the named one, or the one of highest priority that can.

``POSENC_BACKEND`` names the default for ``"auto"``; ``POSENC_TRACE=1`` shows each choice, and why no other backend
was taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from posenc.backend import AttentionBackend, needs_gradient
from posenc.errors import BackendError
from posenc.plan import PositionPlan
from posenc.plugins import backends
from posenc.trace import trace, tracing


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """Everything that the choice of a backend depends on; see :func:`posenc.attention` for the arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    plans: Sequence[PositionPlan]
    softcap: float | None
    sinks: Tensor | None
    return_lse: bool = False

    def __str__(self) -> str:
        dtype = str(self.q.dtype).removeprefix("torch.")
        gradient = "with" if needs_gradient(self.q, self.k, self.v) else "no"
        mask = "no" if self.mask is None else "with a"
        queries, keys = self.q.shape[2], self.k.shape[2]
        return f"{dtype} on {self.q.device.type}, {queries} queries over {keys} keys, {gradient} gradient, {mask} mask"


def choose_backend(name: str, case: AttentionCase) -> AttentionBackend:
    """The named backend if it can run the case, or for ``"auto"`` the first in order of priority that can.

    Raises
    ------
    BackendError
        If the named backend cannot run the case, or none can: with the reason of each.
    UnknownNameError
        If no backend of that name is installed.
    """
    name = name if name != "auto" else os.environ.get("POSENC_BACKEND", "auto")
    return _by_priority(case) if name == "auto" else _by_name(name, case)


def _by_name(name: str, case: AttentionCase) -> AttentionBackend:
    backend: AttentionBackend = backends()[name].backend
    reason = _refusal(backend, case)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this case: {reason}. Choose another, or backend='auto'.")
    if tracing():
        trace("backend %s, as asked: %s", name, case)
    return backend


def _by_priority(case: AttentionCase) -> AttentionBackend:
    refusals: list[str] = []
    for info in sorted(backends().values(), key=lambda info: -info.backend.priority_for(case.q, case.k)):
        backend: AttentionBackend = info.backend
        reason = _refusal(backend, case)
        if reason is None:
            if tracing():
                why = "; ".join(refusals) or "nothing comes before it"
                trace("backend auto -> %s: %s (%s)", info.name, case, why)
            return backend
        refusals.append(f"{info.name}: {reason}")
    raise BackendError(f"no installed backend can run this case. {'; '.join(refusals)}.")


def _refusal(backend: AttentionBackend, case: AttentionCase) -> str | None:
    """Why a backend cannot run the case, or None when it can."""
    try:
        reason = backend.refuses(case.q, case.k, case.v, case.mask)
    except Exception as error:  # a broken backend must not keep ``auto`` from the others
        return f"it fails to say whether it can: {type(error).__name__}: {error}"
    return reason or _missing_capability(backend, case)


def _missing_capability(backend: AttentionBackend, case: AttentionCase) -> str | None:
    """The first capability that the case needs beyond what ``refuses`` sees, and the backend lacks."""
    able = backend.capabilities
    if not able.logit_interpolation and any(plan.interpolates_logits for plan in case.plans):
        return "it does not interpolate logits"
    if case.softcap is not None and not able.softcap:
        return "it computes no softcap"
    if able.lse_gradients:
        return None
    if case.sinks is not None and needs_gradient(case.q, case.k, case.sinks):
        return "it has no backward pass for attention sinks"
    if case.return_lse and needs_gradient(case.q, case.k):
        return "it has no gradient of the logsumexp that return_lse=True asks for"
    return None
