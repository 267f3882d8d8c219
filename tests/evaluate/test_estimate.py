"""The estimated time of a sweep: measured cells correct the estimates of their task."""

from __future__ import annotations

from typing import Any

import pytest

from posenc.evaluate.sweep import estimate
from posenc.evaluate.sweep.cell import Cell

PASSKEY, PERPLEXITY = {"task": "passkey"}, {"task": "perplexity"}


def cell(task: dict[str, Any], seed: int) -> Cell:
    identity = {"task": task, "seed": seed}
    return Cell(
        label="rope", model="tiny", config={"strategy": "rope"}, task=task, length=256, seed=seed, identity=identity
    )


def test_measured_cells_correct_the_estimates_of_their_task(monkeypatch: pytest.MonkeyPatch):
    cells = [cell(PASSKEY, 0), cell(PASSKEY, 1), cell(PASSKEY, 2), cell(PERPLEXITY, 0)]
    monkeypatch.setattr(estimate, "_estimates", lambda loaded, cells: [1.0, 3.0, 2.0, 5.0])
    known = {cells[0].id: 4.0, cells[1].id: 8.0}
    assert estimate.seconds_per_cell(None, cells, known) == [4.0, 8.0, 6.0, 5.0]
    assert estimate.seconds_per_cell(None, cells, {}) == [1.0, 3.0, 2.0, 5.0]
