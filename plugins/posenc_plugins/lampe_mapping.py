"""Mapping length of LaMPE: the number of positions that a prompt of ``l`` tokens is mapped to.

``U(l) = int(c / (1 + exp(-(a l + b))))`` is the scaled sigmoid of the paper (Zhang et al. 2025,
arXiv 2508.02308, section 3), fitted per model. Its parameters come from a profile, from a file written by
``posenc calibrate``, or from YAML or JSON written by hand::

    mapping: {c: 1536.0, a: 0.00042, b: -2.467}     # or c, a, b at the top level
    window: 2048                                    # any other key is allowed and ignored
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posenc.calibration.file import Calibration, check_same_model, load
from posenc.errors import InvalidConfigError
from posenc.params import Fingerprint


class MappingCurve(BaseModel):
    """The sigmoid ``U(l) = int(c / (1 + exp(-(a l + b))))``; ``c`` is its upper bound in positions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    c: float = Field(gt=0)
    a: float = Field(ge=0)
    b: float

    def __call__(self, length: int) -> int:
        """Mapping length of a prompt of ``length`` tokens."""
        exponent = -(self.a * length + self.b)
        return int(self.c / (1 + math.exp(exponent))) if exponent < 700 else 0  # exp overflows above 709


@dataclass(frozen=True)
class NamedMapping:
    """A curve and, if ``posenc calibrate`` measured it, the head, tail and model of the measurement.

    Parameters
    ----------
    curve : MappingCurve
        The sigmoid.
    source : str
        Name of the profile, or path of the file.
    head, tail : int, optional
        Parameters of the measurement, in tokens.
    model : Fingerprint, optional
        The model that was measured.
    """

    curve: MappingCurve
    source: str
    head: int | None = None
    tail: int | None = None
    model: Fingerprint | None = None

    def check_model(self, model: Fingerprint) -> None:
        """Raise InvalidConfigError if ``model`` is not the model that was measured."""
        if self.model is not None:
            check_same_model(self.model, model, source=f"lampe.mapping: {self.source}")


PROFILES = {
    "llama2": MappingCurve(c=2489.1055552214357, a=8.673006440952035e-05, b=-0.648012322406978),
    "llama3": MappingCurve(c=6204.409324666837, a=0.00010493097327094324, b=-2.466638011138158),
    "mistral": MappingCurve(c=24576, a=0.00010493097327094324, b=-2.466638011138158),
    "llama3.1": MappingCurve(c=82358.52413056031, a=4.505261149632588e-05, b=-2.788576860718702),
}
"""Published with the method."""

PROFILE_WINDOWS = {"llama2": 4096, "llama3": 8192, "mistral": 32768, "llama3.1": 131072}
"""Windows, in tokens, of the models that the profiles were fitted for."""

OFFICIAL_SHORT = {"llama2": 1536, "llama3": 1536, "mistral": 1536}
"""Mapping length of the published code for prompts below 8192 tokens, in place of the curve's."""


def fallback(window: int) -> MappingCurve:
    """The curve of llama3, rescaled to another window."""
    return MappingCurve(c=0.75 * window, a=0.86 / window, b=-2.467)


def check_mapping(value: Any) -> int | str | MappingCurve | None:
    """Accept a profile name or path, a constant, or ``{c, a, b}``; raise ValueError for anything else."""
    if value is None or isinstance(value, MappingCurve):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, dict):
        return _curve(value)
    raise ValueError(
        f"must be a profile ({', '.join(PROFILES)}), a positive whole number, {{c, a, b}}, "
        "or the path of a calibration file"
    )


def _curve(value: dict[Any, Any]) -> MappingCurve:
    try:
        return MappingCurve.model_validate(value)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ValueError(f"{{c, a, b}} is wrong: {'; '.join(problems)}") from None


def named_mapping(name: str, *, key: str) -> NamedMapping:
    """The curve of a profile, or of a calibration file when no profile has that name.

    Raises
    ------
    InvalidConfigError
        If ``name`` is neither, or the file cannot be used; the message begins with ``key``.
    """
    if name in PROFILES:
        return NamedMapping(PROFILES[name], name)
    if not Path(name).exists():
        nearest = get_close_matches(name, PROFILES, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise InvalidConfigError(
            f"{key}: no profile and no file named {name!r}.{hint} Profiles: {', '.join(PROFILES)}. "
            "'posenc calibrate' writes a calibration file."
        )
    try:
        data = load(name)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"{key}: {error}") from None
    measured = data if isinstance(data, Calibration) else None
    if measured is not None:
        data = {"mapping": measured.mapping}
    values = data.get("mapping", data) if isinstance(data, dict) else None
    if not isinstance(values, dict):
        raise InvalidConfigError(
            f"{key}: {name} holds no mapping. It needs the keys c, a and b, at the top level or under 'mapping'."
        )
    try:
        curve = _curve({letter: values[letter] for letter in "cab" if letter in values})
    except ValueError as error:
        raise InvalidConfigError(f"{key}: {name}: {error}") from None
    if measured is None:
        return NamedMapping(curve, name)
    return NamedMapping(curve, name, measured.head, measured.tail, measured.model.fingerprint)
