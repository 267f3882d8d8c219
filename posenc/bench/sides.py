"""Build the two sides of a case of any kind."""

from __future__ import annotations

from posenc.bench import attention, model, padded
from posenc.bench.cases import KINDS, BenchCase
from posenc.bench.timing import Pair


def build(case: BenchCase) -> Pair:
    """Build both sides of a case."""
    if case.kind == "padded_attention":
        return padded.build(case)
    return model.build(case) if KINDS[case.kind].of_model else attention.build(case)
