"""The result file: one run, its command, its machine, and every time that was measured."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from posenc.bench.cases import KINDS
from posenc.errors import InvalidInputError
from posenc.files import plain, replacing
from posenc.params import StrictModel

BUSY = 0.1
"""Other work on more than this share of the cores disturbs the times."""


class Machine(StrictModel):
    """What a run was measured on."""

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
        """True when other work ran while this was measured."""
        return self.other_cores is not None and self.other_cores > BUSY * self.cores


class Memory(StrictModel):
    """Peak bytes of one call beyond its inputs."""

    plain: NonNegativeInt
    remapped: NonNegativeInt


class Row(StrictModel):
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
    """Attention kernels alone, on the same tensors already rotated and in the same rounds: seconds by name."""
    refused: dict[str, str] = Field({})
    """Baselines that could not run the case, and why."""

    @property
    def ratios(self) -> list[float]:
        """Remapped over plain, pair by pair."""
        return [b / a for a, b in zip(self.plain, self.remapped, strict=True)]

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)

    def over(self, baseline: str) -> float | None:
        """Remapped over a baseline, median over the rounds; None where that baseline was not measured."""
        times = self.baselines.get(baseline)
        if times is None:
            return None
        return statistics.median(b / a for a, b in zip(times, self.remapped, strict=True))

    @property
    def memory_ratio(self) -> float | None:
        """Peak of the remapped side over that of the plain one."""
        return self.memory.remapped / self.memory.plain if self.memory and self.memory.plain else None


class Check(StrictModel):
    """What was checked of one backend before its times were measured: its correctness tests, or its canary's cases."""

    backend: str
    kind: Literal["tests", "canary"] = "tests"
    passed: NonNegativeInt
    failed: NonNegativeInt
    skipped: NonNegativeInt
    problem: str | None = None
    stopped_after: float | None = None
    """Seconds after which it was stopped, where that left something unchecked."""

    @property
    def good(self) -> bool:
        """True when something was checked and all of it was right."""
        return self.passed > 0 and not self.failed and self.problem is None


class Result(StrictModel):
    """One run."""

    format: Literal["posenc-bench"]
    version: Literal[1]
    command: str
    machine: Machine
    rows: tuple[Row, ...] = Field(min_length=1)
    checks: tuple[Check, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """A name for what is inside: kinds, shapes, lengths, dtypes, threads, machine."""
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


def prepare(folder: Path) -> None:
    """Make a folder and see that it can be written, before minutes are spent.

    Raises
    ------
    InvalidInputError
        If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInputError(f"{folder}: cannot be written ({error.strerror or error}).") from None


def save(result: Result, out: Path) -> Path:
    """Write a result to a ``.json`` file, or into a folder under a name for what is inside."""
    target = out if is_file(out) else out / result.file_name
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(plain(result.model_dump()), indent=1) + "\n", encoding="utf-8")
    return target


def read(path: Path) -> Result:
    """Read a result file.

    Raises
    ------
    InvalidInputError
        If it is not one; the message names the file and the first thing that is wrong.
    """
    advice = "Remove it, or measure again with posenc bench --out."
    try:
        result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path}: not a result of posenc bench (not UTF-8 text). {advice}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidInputError(f"{path}: not a result of posenc bench ({reason}). {advice}") from None
    for row in result.rows:
        if {len(row.plain)} != {len(times) for times in (row.remapped, *row.baselines.values())}:
            raise InvalidInputError(f"{path}: not a result of posenc bench (a round lacks a side). {advice}")
        if row.kind not in KINDS:
            raise InvalidInputError(f"{path}: unknown kind {row.kind!r}. {advice}")
    return result


def read_folder(folder: Path) -> dict[str, Result]:
    """All results of a folder, by file name.

    Raises
    ------
    InvalidInputError
        If the folder holds none, or a file that is not one.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InvalidInputError(f"{folder}: no result files (*.json). Make one with posenc bench --out {folder}.")
    return {file.name: read(file) for file in files}
