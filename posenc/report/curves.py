"""V-curves and choices, as ``posenc calibrate`` writes them: its file, and the points of its sweep (``--json``)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posenc.errors import InvalidInputError
from posenc.evaluate.perplexity import Mean
from posenc.report.svg import Point
from posenc.report.tables import with_error

CALIBRATION = "posenc-calibration"
VERSION = 1


class _Open(BaseModel):
    """Reads the keys that a page shows, and leaves the others to whoever wrote them."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Score(_Open):
    loss: float
    standard_error: float | None = None
    documents: int

    @property
    def perplexity(self) -> str:
        value = math.exp(min(self.loss, 700.0))
        return with_error(value, math.nan if self.standard_error is None else value * self.standard_error)


class _Choice(_Open):
    params: dict[str, Any]
    tried: int
    calibration: _Score
    report: _Score | None = None


class _Named(_Open):
    name: str


class _Texts(_Open):
    calibration: tuple[_Named, ...]
    report: tuple[_Named, ...] = ()


class _File(_Open):
    version: int
    command: str
    model: _Named
    texts: _Texts
    native: dict[int, _Score]
    strategies: dict[str, dict[int, _Choice]]


class _Tried(_Open):
    params: dict[str, Any]
    losses: tuple[float, ...] = Field(min_length=1)
    dropped: bool = False


@dataclass(frozen=True)
class Curve:
    """The candidates of one strategy at one length, over the parameter with most values.

    Parameters
    ----------
    lines : dict of str to list of Point
        One per value of the other parameters: mean loss in nats per token, and the standard error of its paired
        difference to the best candidate.
    """

    strategy: str
    length: int
    parameter: str
    lines: dict[str, list[Point]]


@dataclass(frozen=True)
class Calibration:
    """What a page shows of a calibration.

    Parameters
    ----------
    choices : list of list of str
        Rows: tokens, strategy, parameters, how many were tried, perplexity on the texts it was chosen on, and on
        others.
    """

    command: str
    model: str
    texts: str
    curves: list[Curve]
    choices: list[list[str]]


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file, or what ``posenc calibrate --json`` printed.

    Raises
    ------
    InvalidInputError
        If it is damaged or of another version.
    """
    text = path.read_text(encoding="utf-8")
    data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    try:
        file = _File.model_validate(data.get("calibration", data))
        tried = {
            name: {int(length): [_Tried.model_validate(point) for point in points] for length, points in found.items()}
            for name, found in data.get("sweeps", {}).items()
        }
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, reason["loc"]))
        raise InvalidInputError(f"{path}: damaged calibration ({where}: {reason['msg']}).") from None
    if file.version != VERSION:
        raise InvalidInputError(
            f"{path}: calibration file version {file.version}; this posenc reads {VERSION}. Calibrate again."
        )
    curves = [
        _curve(name, length, points) for name, found in tried.items() for length, points in found.items() if points
    ]
    texts = f"chosen on {_names(file.texts.calibration)}, reported on {_names(file.texts.report)}"
    return Calibration(file.command, file.model.name, texts, curves, _choices(file))


def _curve(strategy: str, length: int, points: list[_Tried]) -> Curve:
    values: dict[str, set[str]] = {}
    for point in points:
        for key, value in point.params.items():
            if isinstance(value, int | float):
                values.setdefault(key, set()).add(str(value))
    parameter = max(values, key=lambda key: len(values[key])) if values else ""
    whole = [point for point in points if not point.dropped] or points
    best = min(whole, key=lambda point: Mean(point.losses).mean)
    lines: dict[str, list[Point]] = {}
    for point in points:
        common = min(len(point.losses), len(best.losses))
        gap = Mean(point.losses[:common]).minus(Mean(best.losses[:common]))
        others = ", ".join(f"{key} {value}" for key, value in point.params.items() if key != parameter)
        error = 0.0 if point is best else gap.standard_error
        at = Point(float(point.params.get(parameter, 0)), Mean(best.losses).mean + gap.mean, error)
        lines.setdefault(others or strategy, []).append(at)
    return Curve(strategy, length, parameter, {name: sorted(line, key=lambda p: p.x) for name, line in lines.items()})


def _choices(file: _File) -> list[list[str]]:
    rows = []
    for length, native in sorted(file.native.items()):
        rows.append([str(length), "native", "", "", native.perplexity, ""])
        for name, found in file.strategies.items():
            if length in found:
                choice = found[length]
                params = ", ".join(f"{key}={value}" for key, value in choice.params.items())
                reported = "" if choice.report is None else choice.report.perplexity
                rows.append([str(length), name, params, str(choice.tried), choice.calibration.perplexity, reported])
    return rows


def _names(texts: tuple[_Named, ...]) -> str:
    return ", ".join(text.name for text in texts) or "no other text"
