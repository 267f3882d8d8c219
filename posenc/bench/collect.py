"""A result made of the JSON lines of a run, whether the run came to its end or not.

Lines are appended by ``scripts.gpu`` as things happen, each an object with one of these keys: ``facts`` (the machine),
``check`` (what the tests or the canary of a backend gave), ``unusable`` (a backend, and why it cannot run),
``command``, ``row`` (a case's times), ``left_out`` (a case's backend, and why it was not measured), ``ended`` (the load
after it).
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
CUT_SHORT = "the run was cut short: what it had not reached is not listed"


def collect(folder: Path) -> Result:
    """The result of a folder's lines.

    Raises
    ------
    InvalidInputError
        If nothing was measured there.
    """
    found = lines.read(folder / FILE)
    measured = rows(folder)
    facts = next((line["facts"] for line in found if "facts" in line), None)
    if not measured or facts is None:
        raise InvalidInputError(f"{folder / FILE}: holds no times. Measure with python -m scripts.gpu.")
    other = [line["other_cores"] for line in found if line.get("other_cores") is not None]
    ended = next((line["ended"] for line in reversed(found) if "ended" in line), None)
    facts |= {
        "other_cores": statistics.median(other) if other else None,
        "load_after": None if ended is None else ended["load_after"],
    }
    return Result(
        format="posenc-bench",
        version=1,
        command=next(line["command"] for line in found if "command" in line),
        machine=Machine(**facts),
        rows=measured,
        checks=tuple(checks(folder)),
        left_out=(*left_out(folder), *(() if ended is not None else (CUT_SHORT,))),
    )


def rows(folder: Path) -> tuple[BenchRow, ...]:
    """The times of a folder's lines."""
    return tuple(BenchRow.model_validate(line["row"]) for line in lines.read(folder / FILE) if "row" in line)


def checks(folder: Path) -> list[Check]:
    """The last check of every backend and kind."""
    found = (Check.model_validate(line["check"]) for line in lines.read(folder / FILE) if "check" in line)
    return list({(check.backend, check.kind): check for check in found}.values())


def left_out(folder: Path) -> list[str]:
    """What was not measured: how many cases of each backend, by reason."""
    entries = [line["left_out"] for line in lines.read(folder / FILE) if "left_out" in line]
    counted = Counter((entry["backend"], entry["reason"]) for entry in entries)
    return [f"{backend}: {reason}" for backend, reason in unusable(folder).items()] + [
        f"{backend}: {reason}" if count == 1 else f"{backend}: {count} cases: {reason}"
        for (backend, reason), count in counted.items()
    ]


def unusable(folder: Path) -> dict[str, str]:
    """Backends that cannot run there, and why."""
    entries = (line["unusable"] for line in lines.read(folder / FILE) if "unusable" in line)
    return {entry["backend"]: entry["reason"] for entry in entries}


def forget_times(folder: Path) -> None:
    """Keep what the checks found, for times that are measured anew.

    Raises
    ------
    InvalidInputError
        If there are no checks.
    """
    kept = [line for line in lines.read(folder / FILE) if line.keys() & {"facts", "check", "unusable"}]
    if not kept:
        raise InvalidInputError(f"{folder / FILE}: holds no checks. Run python3 -m scripts.gpu --only checks first.")
    with replacing(folder / FILE) as temporary:
        for line in kept:
            lines.append(temporary, line)
