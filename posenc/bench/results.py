"""The result file: one run with its command, its machine, and every time that was measured."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from posenc.bench.cases import KINDS
from posenc.errors import InvalidInputError
from posenc.files import write_json
from posenc.params import StrictModel

BUSY = 0.1
"""Share of the cores; if other work uses more, the times are not trustworthy."""


class Machine(StrictModel):
    """The machine that a run was measured on."""

    cpu: str
    cores: PositiveInt
    memory_gib: float | None
    system: str
    vector_units: str
    wait_policy: str
    versions: dict[str, str]
    load_before: float | None
    load_after: float | None
    other_cores: float | None
    gpu: str | None = None
    driver: str | None = None

    @property
    def busy(self) -> bool:
        """True if other work ran during the run."""
        return self.other_cores is not None and self.other_cores > BUSY * self.cores


class Memory(StrictModel):
    """Peak bytes of one call beyond its inputs."""

    plain: NonNegativeInt
    remapped: NonNegativeInt


class BenchRow(StrictModel):
    """One case and its times in seconds, one entry per round."""

    kind: str
    shape: str
    dtype: str
    threads: PositiveInt
    length: PositiveInt
    window: PositiveInt
    strategy: str
    params: dict[str, Any]
    backend: str
    device: str = "cpu"
    clock: Literal["wall", "events", "graph"] = "wall"
    first: tuple[PositiveFloat, PositiveFloat]
    plain: tuple[PositiveFloat, ...] = Field(min_length=1)
    remapped: tuple[PositiveFloat, ...] = Field(min_length=1)
    memory: Memory | None
    cache: Literal["rotated", "raw"] = "rotated"
    baselines: dict[str, tuple[PositiveFloat, ...]] = Field({})
    """Seconds of attention kernels alone, by name: on the same tensors, already rotated, in the same rounds."""
    refused: dict[str, str] = Field({})
    """Baselines that could not run the case, and why."""

    @property
    def ratios(self) -> list[float]:
        """Remapped over plain, one ratio per round."""
        return [b / a for a, b in zip(self.plain, self.remapped, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def over(self, baseline: str) -> float | None:
        """Remapped over a baseline, median over the rounds; None if that baseline was not measured."""
        times = self.baselines.get(baseline)
        if times is None:
            return None
        return statistics.median(b / a for a, b in zip(times, self.remapped, strict=True))

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of the remapped side over that of the plain side; None if it was not measured."""
        return self.memory.remapped / self.memory.plain if self.memory and self.memory.plain else None


class Check(StrictModel):
    """One check of a backend before it was timed: its correctness tests, or the cases of its canary."""

    backend: str
    kind: Literal["tests", "canary"] = "tests"
    passed: NonNegativeInt
    failed: NonNegativeInt
    skipped: NonNegativeInt
    problem: str | None = None
    stopped_after: float | None = None
    """Seconds after which it was stopped, if that left something unchecked."""

    @property
    def good(self) -> bool:
        """True if something was checked and all of it passed."""
        return self.passed > 0 and not self.failed and self.problem is None


class Result(StrictModel):
    """The result of one run."""

    format: Literal["posenc-bench"]
    version: Literal[1]
    command: str
    machine: Machine
    rows: tuple[BenchRow, ...] = Field(min_length=1)
    checks: tuple[Check, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """A file name from the content: kinds, shapes, lengths, dtypes, threads, machine."""
        kinds, shapes, dtypes = (_joined(getattr(row, key) for row in self.rows) for key in ("kind", "shape", "dtype"))
        lengths = sorted({row.length for row in self.rows})
        span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]}-to-{lengths[-1]}"
        if self.machine.gpu is None:
            threads = _joined(str(row.threads) for row in self.rows)
            machine = f"{threads}-threads-{self.machine.cpu}-{self.machine.cores}-cores"
        else:
            machine = self.machine.gpu
        text = "-".join((kinds, shapes, span, dtypes, machine))
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + ".json"


def _joined(values: Any) -> str:
    return "-".join(dict.fromkeys(values))


def is_file(out: Path) -> bool:
    """True for the name of a result file, False for that of a folder."""
    return out.suffix == ".json"


def save(result: Result, out: Path) -> Path:
    """Write a result to a ``.json`` file, or into a folder under its own file name."""
    target = out if is_file(out) else out / result.file_name
    return write_json(result.model_dump(), target)


ADVICE = "Remove it, or measure again with posenc bench --out."


def read(path: Path) -> Result:
    """Read a result file.

    Raises
    ------
    InvalidInputError
        If it is not a result file; the message names the file and the first problem.
    """
    try:
        result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        raise _not_a_result(path, "not UTF-8 text") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _not_a_result(path, f"{where}: {first['msg']}" if where else first["msg"]) from None
    for row in result.rows:
        if {len(row.plain)} != {len(times) for times in (row.remapped, *row.baselines.values())}:
            raise _not_a_result(path, "a round lacks a side")
        if row.kind not in KINDS:
            raise InvalidInputError(f"{path}: unknown kind {row.kind!r}. {ADVICE}")
    return result


def _not_a_result(path: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(f"{path}: not a result of posenc bench ({reason}). {ADVICE}")


def read_folder(folder: Path) -> dict[str, Result]:
    """Read all results of a folder, by file name.

    Raises
    ------
    InvalidInputError
        If the folder holds no result file, or a JSON file that is not one.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InvalidInputError(f"{folder}: no result files (*.json). Make one with posenc bench --out {folder}.")
    return {file.name: read(file) for file in files}
