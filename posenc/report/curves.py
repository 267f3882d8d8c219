"""V-curves and choices, as ``posenc calibrate`` writes them: its file, and the losses of its sweeps (``--bundle``)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posenc.calibration.file import Calibration, LossScore, TextRecord
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
    """The parts of a calibration that a page shows.

    Parameters
    ----------
    fit : str
        LaMPE's curve in words; empty if it was not fitted.
    choices : list of list of str
        Rows: tokens, strategy, parameters, number of candidates, perplexity on the texts that the choice was made on,
        and on others.
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
    bundle = parse_bundle(data, source=str(path))
    calibration = bundle.calibration
    return CalibrationSummary(
        command=calibration.command,
        model=calibration.model.name,
        texts=f"chosen on {_names(calibration.texts.calibration)}, reported on {_names(calibration.texts.report)}",
        fit=calibration.fit_in_words,
        curves=[_curve(sweep) for sweep in bundle.candidates()],
        choices=_choices(calibration),
    )


def in_words(params: dict[str, Any]) -> str:
    """Parameters for tables: ``head=64, mapping=128``; a fitted mapping is ``curve``."""
    return ", ".join("curve" if isinstance(value, dict) else f"{key}={value}" for key, value in params.items())


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
        drawn = ChartPoint(float(params.get(parameter, 0)), best.losses.mean + gap.mean, error)
        lines.setdefault(others or sweep.strategy, []).append(drawn)
    ordered = {name: sorted(line, key=lambda point: point.x) for name, line in lines.items()}
    return VCurve(sweep.strategy, sweep.length, parameter, ordered)


def _choices(calibration: Calibration) -> list[list[str]]:
    rows = []
    for length, native in sorted(calibration.native.items()):
        report = calibration.native_report.get(length)
        rows.append([str(length), "native", "", "", _perplexity(native), _perplexity(report)])
        choices = {name: by_length[length] for name, by_length in calibration.strategies.items() if length in by_length}
        if length in calibration.fitted:
            choices["lampe, fitted curve"] = calibration.fitted[length]
        for name, choice in choices.items():
            scores = [_perplexity(choice.calibration), _perplexity(choice.report)]
            rows.append([str(length), name, in_words(choice.params), str(choice.tried), *scores])
    return rows


def _perplexity(score: LossScore | None) -> str:
    """The perplexity with its error, to first order."""
    if score is None:
        return ""
    value = math.exp(min(score.loss, 700.0))
    return with_error(value, math.nan if score.standard_error is None else value * score.standard_error)


def _names(texts: tuple[TextRecord, ...]) -> str:
    return ", ".join(text.name for text in texts) or "no other text"
