"""The calibration file: what was measured on which model and texts, and the parameters that were chosen.

The file is YAML or JSON. ``lampe`` reads its keys ``mapping``, ``head`` and ``tail``; ``auto`` reads ``strategies``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from posenc.errors import InvalidConfigError
from posenc.files import expanded, read_yaml, replacing
from posenc.params import Fingerprint, StrictModel

FORMAT = "posenc-calibration"
VERSION = 1
ADVICE = "Make one with 'posenc calibrate'."
CLEAR = 2.0
"""How many standard errors a paired difference must exceed to count."""


class LossScore(StrictModel):
    """Mean loss over documents, and the paired difference to the model without any strategy.

    Losses are in nats per token. Standard errors are over documents, None for a single document.
    """

    loss: float
    standard_error: float | None
    over_native: float
    over_native_error: float | None
    documents: PositiveInt

    @property
    def perplexity(self) -> str:
        """Perplexity as text, ``"12.34 ± 0.56"``, with the standard error to first order."""
        value = math.exp(min(self.loss, 700.0))
        return f"{value:.2f}" + ("" if self.standard_error is None else f" ± {value * self.standard_error:.2f}")

    @property
    def clearly_better(self) -> bool:
        """True when the loss is below the native one by more than :data:`CLEAR` standard errors."""
        return self.over_native + CLEAR * (self.over_native_error or 0.0) < 0


class Choice(StrictModel):
    """The best parameters of one strategy at one length.

    Parameters
    ----------
    params : dict
        Parameters of the strategy.
    tried : int
        How many candidates they were chosen from.
    calibration : LossScore
        Score on the texts that the choice was made on.
    report : LossScore, optional
        Score on other texts, which did not affect the choice.
    """

    params: dict[str, Any]
    tried: PositiveInt
    calibration: LossScore
    report: LossScore | None = None


class TextRecord(StrictModel):
    """A tokenized text."""

    name: str
    tokens: PositiveInt
    sha256: str


class CalibrationSettings(StrictModel):
    """All other settings that the numbers depend on."""

    lengths: tuple[PositiveInt, ...]
    scored_tokens: PositiveInt
    documents: PositiveInt
    seed: int
    stopping: str
    dtype: str = "torch.float32"


class Confidence(StrictModel):
    """95% percentile intervals from resampling the documents."""

    samples: PositiveInt
    a: tuple[float, float]
    b: tuple[float, float]
    mapping_length: dict[PositiveInt, tuple[int, int]]


class ModelRecord(StrictModel):
    """The model that was measured."""

    name: str
    fingerprint: Fingerprint


class Texts(StrictModel):
    """The texts that the choice was made on, and those that it is reported on."""

    calibration: tuple[TextRecord, ...]
    report: tuple[TextRecord, ...] = ()


class Calibration(StrictModel):
    """The content of a calibration file; docs/calibrate.md explains the keys."""

    format: Literal["posenc-calibration"] = "posenc-calibration"
    version: Literal[1] = 1
    command: str
    model: ModelRecord
    texts: Texts
    settings: CalibrationSettings
    versions: dict[str, str]
    mapping: dict[str, float] | None = None
    head: PositiveInt | None = None
    tail: PositiveInt | None = None
    confidence: Confidence | None = None
    fitted: dict[PositiveInt, Choice] = Field({})
    native: dict[PositiveInt, LossScore]
    native_report: dict[PositiveInt, LossScore] = Field({})
    strategies: dict[str, dict[PositiveInt, Choice]] = Field(min_length=1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Calibrated lengths in tokens, shortest first."""
        return tuple(sorted(self.settings.lengths))

    @property
    def fit_in_words(self) -> str:
        """LaMPE's curve and its confidence intervals in one sentence; empty if it was not fitted."""
        if self.mapping is None or self.confidence is None:
            return ""
        c, a, b = (f"{self.mapping[key]:g}" for key in ("c", "a", "b"))
        intervals = ", ".join(
            f"{low}..{high} at {length}" for length, (low, high) in self.confidence.mapping_length.items()
        )
        return (
            f"lampe: head {self.head}, U(l) = {c} / (1 + exp(-({a} l + {b}))); 95% of {self.confidence.samples} "
            f"resamplings of the documents put U within {intervals}."
        )

    def ranked(self, length: int) -> list[tuple[str, Choice]]:
        """Strategies measured at a length, lowest mean loss on the calibration texts first."""
        choices = [(name, by_length[length]) for name, by_length in self.strategies.items() if length in by_length]
        return sorted(choices, key=lambda pair: pair[1].calibration.loss)


def is_calibration(data: Any) -> bool:
    """True for the content of a calibration file, whatever its version."""
    return isinstance(data, dict) and data.get("format") == FORMAT


def read(path: str | Path) -> Calibration:
    """Read a calibration file.

    Raises
    ------
    InvalidConfigError
        If it cannot be read, is not a calibration file, or has another version.
    """
    return parse(read_yaml(path), source=str(path))


def load(path: str | Path) -> Any:
    """Read a calibration file, or the plain data of any other YAML file; raises as :func:`read` does."""
    data = read_yaml(path)
    return parse(data, source=str(path)) if is_calibration(data) else data


def parse(data: Any, *, source: str) -> Calibration:
    """Check plain data against :class:`Calibration`; raises as :func:`read` does."""
    if not is_calibration(data):
        raise InvalidConfigError(f"{source}: not a calibration file (it lacks 'format: {FORMAT}'). {ADVICE}")
    if data.get("version") != VERSION:
        raise InvalidConfigError(
            f"{source}: calibration file version {data.get('version')!r}; this posenc reads {VERSION}. {ADVICE}"
        )
    try:
        return Calibration.model_validate(data)
    except ValidationError as error:
        raise damaged(error, source=source) from None


def damaged(error: ValidationError, *, source: str) -> InvalidConfigError:
    """The error for a calibration file with a wrong value."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return InvalidConfigError(f"{source}: damaged calibration file ({where}: {first['msg']}). {ADVICE}")


def write(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration file, completely or not at all.

    Raises
    ------
    InvalidInputError
        If it cannot be written; an existing file then stays as it was.
    """
    target = expanded(path)
    text = yaml.safe_dump(calibration.model_dump(exclude_none=True), sort_keys=False, width=120)
    with replacing(target) as temporary:
        temporary.write_text(f"# Written by posenc calibrate; docs/calibrate.md explains the keys.\n{text}", "utf-8")
    return target


def check_same_model(measured: Fingerprint, model: Fingerprint, *, source: str) -> None:
    """Raise if numbers were measured on another model than this one.

    Raises
    ------
    InvalidConfigError
        If the fingerprints differ; the message names what differs.
    """
    differences = model.differences(measured)
    if differences:
        raise InvalidConfigError(
            f"{source} was measured on another model. This model and that one differ in {'; '.join(differences)}. "
            "Run 'posenc calibrate' on this model, or pass the parameters by value if you know that they fit."
        )
