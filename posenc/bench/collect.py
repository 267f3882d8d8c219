"""Make a result from the JSON lines of a run, even if the run did not end.

``scripts.gpu`` appends a line for every event. Each is an object with one of these keys: ``facts`` (the machine),
``check`` (the outcome of a backend's tests or canary), ``unusable`` (a backend, and why it cannot run), ``command``,
``row`` (the times of a case), ``left_out`` (the backend of a case, and why it was not measured), ``ended`` (the load
after the run).
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

from posenc.bench import lines
from posenc.bench.results import BenchRow, Check, Machine, Result
from posenc.errors import InvalidInputError
from posenc.files import replacing

FILE = "gpu.jsonl"
CUT_SHORT = "the run was cut short: cases that it did not reach are not listed"


def collect(folder: Path) -> Result:
    """Make the result of a folder's lines.

    Raises
    ------
    InvalidInputError
        If the folder holds no times.
    """
    entries = lines.read(folder / FILE)
    measured = rows(folder)
    facts = next((entry["facts"] for entry in entries if "facts" in entry), None)
    if not measured or facts is None:
        raise InvalidInputError(f"{folder / FILE}: holds no times. Measure with python -m scripts.gpu.")
    other_cores = [entry["other_cores"] for entry in entries if entry.get("other_cores") is not None]
    ended = next((entry["ended"] for entry in reversed(entries) if "ended" in entry), None)
    facts |= {
        "other_cores": statistics.median(other_cores) if other_cores else None,
        "load_after": None if ended is None else ended["load_after"],
    }
    return Result(
        format="posenc-bench",
        version=1,
        command=next(entry["command"] for entry in entries if "command" in entry),
        machine=Machine(**facts),
        rows=measured,
        checks=tuple(checks(folder)),
        left_out=(*left_out(folder), *(() if ended is not None else (CUT_SHORT,))),
    )


def rows(folder: Path) -> tuple[BenchRow, ...]:
    """Read the times from a folder's lines."""
    return tuple(BenchRow.model_validate(line["row"]) for line in lines.read(folder / FILE) if "row" in line)


def checks(folder: Path) -> list[Check]:
    """Read the last check of every backend and kind."""
    records = (Check.model_validate(line["check"]) for line in lines.read(folder / FILE) if "check" in line)
    return list({(check.backend, check.kind): check for check in records}.values())


def left_out(folder: Path) -> list[str]:
    """List what was not measured: how many cases of each backend, by reason."""
    entries = [line["left_out"] for line in lines.read(folder / FILE) if "left_out" in line]
    counted = Counter((entry["backend"], entry["reason"]) for entry in entries)
    return [f"{backend}: {reason}" for backend, reason in unusable(folder).items()] + [
        f"{backend}: {reason}" if count == 1 else f"{backend}: {count} cases: {reason}"
        for (backend, reason), count in counted.items()
    ]


def unusable(folder: Path) -> dict[str, str]:
    """List the backends that cannot run on the machine, and why."""
    entries = (line["unusable"] for line in lines.read(folder / FILE) if "unusable" in line)
    return {entry["backend"]: entry["reason"] for entry in entries}


def forget_times(folder: Path) -> None:
    """Remove the times and keep the outcome of the checks, before the times are measured again.

    Raises
    ------
    InvalidInputError
        If the folder holds no checks.
    """
    checks = [entry for entry in lines.read(folder / FILE) if entry.keys() & {"facts", "check", "unusable"}]
    if not checks:
        raise InvalidInputError(f"{folder / FILE}: holds no checks. Run python3 -m scripts.gpu --only checks first.")
    with replacing(folder / FILE) as temporary:
        for entry in checks:
            lines.append(temporary, entry)
