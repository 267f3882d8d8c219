"""A worker process: cells on stdin, one JSON line each; what became of them on stdout. Ends with its input.

Run by :func:`posenc.evaluate.sweep.executors.processes` as ``python -m posenc.evaluate.sweep.worker FOLDER``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from posenc.errors import PosencError
from posenc.evaluate.sweep.executors import Done, measure_into
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.session import Cell, Session


def main(folder: str) -> None:
    """Measure until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    session, results = Session(), ResultsFolder(Path(folder))
    for line in sys.stdin:
        try:
            done = measure_into(results, session, Cell.model_validate_json(line))
        except PosencError as error:  # results cannot be written: the sweep ends
            done = Done(id="", error=str(error))
        answers.write(done.model_dump_json() + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
