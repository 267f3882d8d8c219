"""V-curves and choices, as ``posenc calibrate`` writes them: its file, and the losses of its sweeps (``--bundle``)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posenc.calibration import file as record
from posenc.evaluate.calibrate.bundle import parse_bundle
from posenc.evaluate.calibrate.sweep import CandidateSweep
from posenc.files import read_yaml
from posenc.report.svg import ChartPoint
from posenc.report.tables import with_error


@dataclass(frozen=True)
class VCurve:
    """The candidates of one strategy at one length, over the parameter with most values.

    Parameters
    ----------
    lines : dict of str to list of ChartPoint
        One per value of the other parameters: mean loss in nats per token, and the standard error of its paired
        difference to the best candidate.
    """

    strategy: str
    length: int
    parameter: str
    lines: dict[str, list[ChartPoint]]


@dataclass(frozen=True)
class CalibrationSummary:
    """What a page shows of a calibration.

    Parameters
    ----------
    fit : str
        LaMPE's curve in words; empty where it was not fitted.
    choices : list of list of str
        Rows: tokens, strategy, parameters, how many were tried, perplexity on the texts it was chosen on, and on
        others.
    """

    command: str
    model: str
    texts: str
    fit: str
    curves: list[VCurve]
    choices: list[list[str]]


def read_calibration(path: Path) -> CalibrationSummary:
    """Read a calibration file, or what ``posenc calibrate`` writes with ``--bundle`` and prints with ``--json``.

    Raises
    ------
    InvalidConfigError
        If it is damaged or of another version.
    """
    data = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_yaml(path)
    found = parse_bundle(data, source=str(path))
    measured = found.calibration
    texts = f"chosen on {_names(measured.texts.calibration)}, reported on {_names(measured.texts.report)}"
    curves = [_curve(sweep) for sweep in found.candidates()]
    fit = measured.fit_in_words
    return CalibrationSummary(measured.command, measured.model.name, texts, fit, curves, _choices(measured))


def _curve(sweep: CandidateSweep) -> VCurve:
    values: dict[str, set[str]] = {}
    for point in sweep.points:
        for key, value in point.candidate.params.items():
            if isinstance(value, int | float):
                values.setdefault(key, set()).add(str(value))
    parameter = max(values, key=lambda key: len(values[key])) if values else ""
    best = sweep.best
    lines: dict[str, list[ChartPoint]] = {}
    for point in sweep.points:
        params, gap = point.candidate.params, sweep.behind(point)
        others = ", ".join(f"{key} {value}" for key, value in params.items() if key != parameter)
        error = 0.0 if point is best else gap.standard_error
        at = ChartPoint(float(params.get(parameter, 0)), best.losses.mean + gap.mean, error)
        lines.setdefault(others or sweep.strategy, []).append(at)
    ordered = {name: sorted(line, key=lambda point: point.x) for name, line in lines.items()}
    return VCurve(sweep.strategy, sweep.length, parameter, ordered)


def _choices(measured: record.Calibration) -> list[list[str]]:
    rows = []
    for length, native in sorted(measured.native.items()):
        rows.append([str(length), "native", "", "", _shown(native), _shown(measured.native_report.get(length))])
        mine = {name: found[length] for name, found in measured.strategies.items() if length in found}
        if length in measured.fitted:
            mine["lampe, fitted curve"] = measured.fitted[length]
        for name, choice in mine.items():
            scores = [_shown(choice.calibration), _shown(choice.report)]
            rows.append([str(length), name, _parameters(choice.params), str(choice.tried), *scores])
    return rows


def _parameters(params: dict[str, Any]) -> str:
    return ", ".join("curve" if isinstance(value, dict) else f"{key}={value}" for key, value in params.items())


def _shown(score: record.LossScore | None) -> str:
    """The perplexity with its error, to first order."""
    if score is None:
        return ""
    value = math.exp(min(score.loss, 700.0))
    return with_error(value, math.nan if score.standard_error is None else value * score.standard_error)


def _names(texts: tuple[record.TextRecord, ...]) -> str:
    return ", ".join(text.name for text in texts) or "no other text"
