"""Logit interpolation between integer positions, written with posenc's public names only.

Far keys are compressed into the pretraining window, which gives them fractional positions. The model has never seen
fractional positions, so logits are interpolated between the two nearest integers, in the manner of GALI
(Li et al. 2025, "A Training-Free Length Extrapolation Approach for LLMs: Greedy Attention Logit Interpolation").

    python examples/logit_interpolation.py
"""

from __future__ import annotations

import numpy as np
from pydantic import PositiveInt

import posenc


class LogitInterpolationParams(posenc.RemapParams):
    near: PositiveInt | None = None


class LogitInterpolation(posenc.PositionStrategy):
    """Distances below ``near`` are exact; beyond them, ``P - near`` tokens share the rest of the window."""

    name = "logit_interpolation"
    summary = "exact distances nearby; logits of farther keys interpolated between whole positions"
    paper = "after Li et al. 2025, GALI"
    Params = LogitInterpolationParams
    capabilities = posenc.Capabilities(bounded=True, uses_prompt=True)

    def segments(self, lengths: posenc.Lengths) -> list[posenc.Segment]:
        index, total = lengths.indices, lengths.total
        window, near = self.require_window("near"), self.tokens("near", 0.25)
        if lengths.prompt <= max(window, near):
            return [posenc.Segment.band("all", total, 0, None, index, index)]
        squeeze = (lengths.prompt - near) / max(window - near, 1)
        # With integer query positions, a pair lies between two integer distances, and its key alone decides where.
        query = np.floor(index / squeeze + near - near / squeeze)
        return [
            posenc.Segment.band("near", total, 0, near, index, index),
            posenc.Segment.band("far", total, near, None, query, index / squeeze, interpolation="logits"),
        ]


@posenc.hookimpl
def posenc_register_strategies(register):
    register(LogitInterpolation)


if __name__ == "__main__":
    print(LogitInterpolation(window=1024).plan(4096).explain())
