"""Documents that are spread evenly over a text; every length of a suite reads the ends of the same ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from posenc.evaluate.tasks.base import Source
from posenc.evaluate.texts import cut_documents


def spread(source: Source, length: int, count: int, *, apart: int, seed: int) -> NDArray[np.int64]:
    """Cut up to `count` documents of `length` tokens out of a text.

    Parameters
    ----------
    apart : int
        Fewest tokens between the ends of two documents; in a short text there are fewer documents.
    seed : int
        0 begins at the start of the text, every other seed somewhere else.

    Returns
    -------
    int64 [N, length]

    Raises
    ------
    InvalidInputError
        If not even one document fits.
    """
    tokens = source.tokens
    spare = max(0, len(tokens) - length) // count
    start = int(np.random.default_rng(seed).integers(spare)) if seed and spare else 0
    return cut_documents(tokens[start:], length, count, step=apart, name=source.text.name)
