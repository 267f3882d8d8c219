"""How long a sweep may take, from two forwards of the model as it is and the cells that are measured already.

Rough: good for minutes or hours, not seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from posenc.evaluate.models import Loaded
from posenc.evaluate.sweep.session import Cell

SHORT, LONG = 256, 1024
"""Tokens of the two forwards."""


def seconds_per_cell(loaded: Loaded, cells: Sequence[Cell], known: Mapping[str, float]) -> list[float]:
    """Seconds of every cell: measured, or estimated as ``a L + b L**2`` for each input that it reads.

    The measured seconds (``known``, by cell id) correct the estimates of the other cells of their task.
    """
    guesses = _guesses(loaded, cells)
    measured = [(cell, guess) for cell, guess in zip(cells, guesses, strict=True) if cell.id in known]

    def correction(task: str) -> float:
        pairs = [(known[cell.id], guess) for cell, guess in measured if cell.task["task"] == task]
        return sum(real for real, _ in pairs) / sum(guess for _, guess in pairs) if pairs else 1.0

    corrections = {task: correction(task) for task in {cell.task["task"] for cell in cells}}
    return [
        known.get(cell.id, guess * corrections[cell.task["task"]]) for cell, guess in zip(cells, guesses, strict=True)
    ]


def _guesses(loaded: Loaded, cells: Sequence[Cell]) -> list[float]:
    import torch

    tokens = torch.zeros(1, LONG, dtype=torch.int64, device=loaded.model.device)
    with loaded.threads(), torch.inference_mode():
        short, long = (_seconds(loaded, tokens[:, :length]) for length in (SHORT, LONG))
    square = max(0.0, (long - short * LONG / SHORT) / (LONG**2 - LONG * SHORT))
    linear = max(0.0, short / SHORT - square * SHORT)
    return [cell.tokens * (linear + square * cell.length) for cell in cells]


def _seconds(loaded: Loaded, tokens: object) -> float:
    """The faster of two forwards: the first one warms up."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.cpu()  # which waits for a GPU
        found.append(time.perf_counter() - began)
    return min(found)
