"""A worker process: reads cells from stdin, one JSON line each, and writes their outcomes to stdout.

Started by :func:`posenc.evaluate.sweep.executors.processes` as ``python -m posenc.evaluate.sweep.worker FOLDER``. It
ends with its input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from posenc.errors import PosencError
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.measure import CellOutcome, measure_into
from posenc.evaluate.sweep.session import Session


def main(folder: str) -> None:
    """Measure until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print; only outcomes go to the real stdout
    session, results = Session(), ResultsFolder(Path(folder))
    for line in sys.stdin:
        try:
            outcome = measure_into(results, session, Cell.model_validate_json(line))
        except PosencError as error:  # results cannot be written: the sweep ends
            outcome = CellOutcome(id="", error=str(error))
        answers.write(outcome.model_dump_json() + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
