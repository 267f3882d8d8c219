"""Estimate how long a sweep takes, from two forward passes of the model as it is and the cells measured so far.

The estimate is rough: it tells minutes from hours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import itemgetter

from posenc.evaluate.models import Loaded
from posenc.evaluate.sweep.cell import Cell

SHORT, LONG = 256, 1024
"""Tokens of the two forward passes."""


def seconds_per_cell(loaded: Loaded, cells: Sequence[Cell], measured: Mapping[str, float]) -> list[float]:
    """Seconds of every cell: measured, or estimated as ``a L + b L**2`` for each input that it reads.

    Parameters
    ----------
    measured : mapping of str to float
        Seconds by cell id. They correct the estimates of the other cells of their task.
    """
    estimates = _estimates(loaded, cells)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for cell, estimate in zip(cells, estimates, strict=True):
        if cell.id in measured:
            pairs.setdefault(cell.task["task"], []).append((measured[cell.id], estimate))
    corrections = {task: sum(map(itemgetter(0), both)) / sum(map(itemgetter(1), both)) for task, both in pairs.items()}
    return [
        measured.get(cell.id, estimate * corrections.get(cell.task["task"], 1.0))
        for cell, estimate in zip(cells, estimates, strict=True)
    ]


def _estimates(loaded: Loaded, cells: Sequence[Cell]) -> list[float]:
    import torch

    tokens = torch.zeros(1, LONG, dtype=torch.int64, device=loaded.model.device)
    with loaded.threads(), torch.inference_mode():
        short, long = (_seconds(loaded, tokens[:, :length]) for length in (SHORT, LONG))
    square = max(0.0, (long - short * LONG / SHORT) / (LONG**2 - LONG * SHORT))
    linear = max(0.0, short / SHORT - square * SHORT)
    return [cell.tokens * (linear + square * cell.length) for cell in cells]


def _seconds(loaded: Loaded, tokens: object) -> float:
    """The faster of two forward passes: the first one warms up."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.cpu()  # which waits for a GPU
        seconds.append(time.perf_counter() - began)
    return min(seconds)
