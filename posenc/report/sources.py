"""Find and read the results for a page: sweeps, calibrations and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posenc.bench import results as bench
from posenc.calibration.file import FORMAT as CALIBRATION
from posenc.errors import InvalidInputError
from posenc.evaluate.sweep.folder import SWEEP, ResultsFolder
from posenc.evaluate.sweep.results import FORMAT, Sweep, read_sweep
from posenc.report.curves import CalibrationSummary, read_calibration

BENCH = "posenc-bench"
SUFFIXES = (".json", ".yaml", ".yml")


@dataclass
class Material:
    """Results by the path they were read from."""

    sweeps: dict[str, Sweep] = field(default_factory=dict)
    calibrations: dict[str, CalibrationSummary] = field(default_factory=dict)
    benches: dict[str, bench.Result] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """True if there is nothing to report."""
        return not (self.sweeps or self.calibrations or self.benches)


def collect(paths: Sequence[Path]) -> Material:
    """Read result folders, bundles, calibration files and benchmark files.

    Parameters
    ----------
    paths : sequence of Path
        Files, or folders that are searched for results; other files in a folder are ignored.

    Raises
    ------
    InvalidInputError
        If a path does not exist, a file in `paths` is no result, a result is damaged or of another version, or there
        are no results at all.
    """
    material = Material()
    for path in paths:
        if path.is_dir():
            _search(path, material)
        elif not path.exists():
            raise InvalidInputError(f"{path}: does not exist. Give results folders or result files.")
        elif not _add(path, material):
            raise InvalidInputError(f"{path}: not a result of posenc eval, posenc calibrate or posenc bench.")
    if material.empty:
        named = ", ".join(map(str, paths))
        raise InvalidInputError(f"{named}: no results here. Make some with posenc eval SUITE.yaml.")
    return material


def _search(folder: Path, material: Material) -> None:
    sweep = folder / SWEEP
    if sweep.is_file() and _format(sweep) in (FORMAT, None):  # None: damaged, which the reader says
        material.sweeps[str(folder)] = ResultsFolder(folder).load()
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _search(entry, material)
        elif entry.suffix in SUFFIXES:
            _add(entry, material)


def _add(path: Path, material: Material) -> bool:
    """Read a file if it is a result, and return whether it is one; the reader of its format refuses a damaged one."""
    kind = _format(path)
    if kind == FORMAT:
        material.sweeps[str(path)] = read_sweep(path)
    elif kind == CALIBRATION:
        material.calibrations[str(path)] = read_calibration(path)
    elif kind == BENCH:
        material.benches[str(path)] = bench.read(path)
    else:
        return False
    return True


def _format(path: Path) -> str | None:
    data: Any
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except (OSError, ValueError):
        return None
    except Exception as error:  # yaml's errors have no common parent among the built-in ones
        if type(error).__module__.startswith("yaml"):
            return None
        raise
    if not isinstance(data, dict):
        return None
    calibration = data.get("calibration")  # in a bundle of posenc calibrate
    return data.get("format") or (calibration.get("format") if isinstance(calibration, dict) else None)
