"""Everything that a calibration measured, in one JSON file: its choices, and the losses behind them.

``posenc calibrate --json`` prints it and ``--bundle`` writes it; ``posenc report`` draws the V-curves of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from posenc.calibration.file import Calibration, damaged, parse
from posenc.evaluate.calibrate.search import Candidate
from posenc.evaluate.calibrate.sweep import CandidateSweep, ScoredCandidate
from posenc.evaluate.perplexity import Mean
from posenc.files import plain, replacing
from posenc.params import StrictModel

if TYPE_CHECKING:
    from posenc.evaluate.calibrate.job import CalibrationOutcome

DECIMALS = 6
"""Of a stored loss: far finer than its error."""


class CandidateLosses(StrictModel):
    """One candidate.

    Parameters
    ----------
    params : dict
    max_relative : float
        Largest relative distance in its plan.
    dropped : bool
        True if it was clearly bad and scored on the first documents only.
    losses : tuple of float
        One per document that it was scored on, in nats per token.
    """

    params: dict[str, Any]
    max_relative: float
    dropped: bool
    losses: tuple[float, ...] = Field(min_length=1)


class CalibrationBundle(StrictModel):
    """A calibration and its losses.

    Parameters
    ----------
    reported : dict
        Losses of the report documents by length and label.
    sweeps : dict
        Candidates by strategy and length.
    """

    calibration: Calibration
    reported: dict[int, dict[str, tuple[float, ...]]] = Field({})
    sweeps: dict[str, dict[int, tuple[CandidateLosses, ...]]] = Field({})

    @model_validator(mode="after")
    def _one_is_whole(self) -> CalibrationBundle:
        for name, by_length in self.sweeps.items():
            for length, candidates in by_length.items():
                most = max((len(candidate.losses) for candidate in candidates), default=0)
                if most != self.calibration.settings.documents:
                    raise ValueError(f"sweeps.{name}.{length}: no candidate has a loss for every document")
        return self

    def candidates(self) -> Iterator[CandidateSweep]:
        """Every sweep, as the calibration saw it."""
        window, documents = self.calibration.model.fingerprint.window, self.calibration.settings.documents
        for name, by_length in self.sweeps.items():
            for length, candidates in by_length.items():
                points = tuple(
                    ScoredCandidate(Candidate(name, entry.params, window), Mean(entry.losses), entry.max_relative)
                    for entry in candidates
                )
                yield CandidateSweep(name, length, documents, points)


def bundle(outcome: CalibrationOutcome) -> CalibrationBundle:
    """Put a calibration and its losses together."""
    return CalibrationBundle(
        calibration=outcome.calibration,
        reported={
            length: {label: _rounded(losses.values) for label, losses in by_label.items()}
            for length, by_label in outcome.reported.items()
        },
        sweeps={
            name: {
                length: tuple(
                    CandidateLosses(
                        params=point.candidate.params,
                        max_relative=point.max_relative,
                        dropped=sweep.dropped(point),
                        losses=_rounded(point.losses.values),
                    )
                    for point in sweep.points
                )
                for length, sweep in by_length.items()
            }
            for name, by_length in outcome.sweeps.items()
        },
    )


def as_dict(content: CalibrationBundle) -> dict[str, Any]:
    """Plain data, ready for JSON."""
    data: dict[str, Any] = plain(content.model_dump(exclude_none=True))
    return data


def write_bundle(content: CalibrationBundle, path: Path) -> Path:
    """Write a bundle with one line per strategy and per reported length, whole or not at all.

    Raises
    ------
    InvalidInputError
        If it cannot be written; what was there before stays.
    """
    data = as_dict(content)
    parts = [f' "calibration": {json.dumps(data["calibration"], indent=1, ensure_ascii=False)}']
    for key in ("reported", "sweeps"):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in data[key].items())
        parts.append(f' "{key}": {{\n{lines}\n }}')
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return path


def parse_bundle(data: Any, *, source: str) -> CalibrationBundle:
    """Check plain data: a bundle, or the content of a calibration file, which has no losses.

    Raises
    ------
    InvalidConfigError
        If it is damaged, or was written by another version.
    """
    if not isinstance(data, dict) or "calibration" not in data:
        return CalibrationBundle(calibration=parse(data, source=source))
    calibration = parse(data["calibration"], source=source)
    losses = {key: data[key] for key in ("reported", "sweeps") if key in data}
    try:
        return CalibrationBundle.model_validate({**losses, "calibration": calibration})
    except ValidationError as error:
        raise damaged(error, source=source) from None


def _rounded(losses: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(loss, DECIMALS) for loss in losses)
