"""The two sides of a case, whatever its kind."""

from __future__ import annotations

from posenc.bench import attention, model, padded
from posenc.bench.cases import KINDS, Case
from posenc.bench.timing import Pair


def build(case: Case) -> Pair:
    """Both sides of a case."""
    if case.kind == "padded_attention":
        return padded.build(case)
    return model.build(case) if KINDS[case.kind].of_model else attention.build(case)
