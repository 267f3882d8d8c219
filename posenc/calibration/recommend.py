"""Which strategy a calibration file recommends for a prompt of a given length, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from posenc.calibration.file import CLEAR, Calibration, Choice, check_same_model, read
from posenc.errors import InvalidConfigError
from posenc.params import Fingerprint, StrictModel
from posenc.plugins import strategies
from posenc.plugins import strategy as named_strategy
from posenc.positions import IdentityStrategy, PositionStrategy

NATIVE = IdentityStrategy.name


class Pick(StrictModel):
    """A strategy with its parameters, and the measurement that speaks for it."""

    strategy: str
    params: dict[str, Any] = Field({})
    because: str

    def make(self, window: int | None) -> PositionStrategy:
        """The strategy that this recommends, for a pretraining window."""
        if self.strategy == NATIVE:
            return IdentityStrategy(window=window, **self.params)
        return named_strategy(self.strategy, window=window, **self.params)

    def __str__(self) -> str:
        return f"{self.strategy}({', '.join(f'{key}={value}' for key, value in self.params.items())})"


class LengthRange(StrictModel):
    """What prompts of up to so many tokens get."""

    up_to: PositiveInt
    pick: Pick


class Recommendation(StrictModel):
    """The recommendation for every prompt length, short enough to travel in a configuration.

    Parameters
    ----------
    source : str
        The calibration file it was read from.
    model : Fingerprint, optional
        The model it was measured on; None where the picks were written by hand.
    ranges : tuple of LengthRange
        By ascending length. A prompt gets the pick of the shortest measured length that is not shorter.
    beyond : tuple of Pick
        For longer prompts than any measured: the first whose plan stays inside the window, else the first.
    """

    source: str = "written by hand"
    model: Fingerprint | None = None
    ranges: tuple[LengthRange, ...] = Field(min_length=1)
    beyond: tuple[Pick, ...] = ()

    def check_model(self, model: Fingerprint) -> None:
        """Refuse another model than the one that was measured; raises InvalidConfigError."""
        if self.model is not None:
            check_same_model(self.model, model, source=self.source)


def read_recommendation(path: str | Path) -> Recommendation:
    """The recommendations of a calibration file; raises InvalidConfigError as :func:`record.read` does."""
    return recommend(read(path), source=str(path))


def recommend(calibration: Calibration, *, source: str) -> Recommendation:
    """Turn measurements into a recommendation.

    Inside the window the identity, unless a strategy is better by more than two standard errors of the paired
    difference, on the calibration texts and on the report texts where there are some: the best of many candidates
    looks good by luck. Beyond it, the lowest mean loss on the calibration texts. Strategies that drop keys are
    never recommended: what they cannot see any more hardly shows in a perplexity.
    """
    window = calibration.model.fingerprint.window
    ranges = []
    if calibration.lengths[0] > window:
        because = f"inside the window of {window} tokens nothing was measured: left as it is"
        ranges.append(LengthRange(up_to=window, pick=Pick(strategy=NATIVE, because=because)))
    for length in calibration.lengths:
        ranked = _reading_everything(calibration, length)
        native = calibration.native[length]
        if length <= window:
            ranked = [(name, choice) for name, choice in ranked if _surely_better(choice)]
            idle = f"no strategy is better by {CLEAR:g} standard errors at {length} tokens"
        else:
            ranked = [(name, choice) for name, choice in ranked if choice.calibration.over_native < 0]
            idle = f"no strategy is better at {length} tokens"
        if ranked:
            pick = _pick(*ranked[0], length, native.loss, ranked[1:])
        else:
            pick = Pick(strategy=NATIVE, because=f"{idle}: the model as it is, {native.loss:.3f} nats per token")
        ranges.append(LengthRange(up_to=length, pick=pick))
    return Recommendation(
        source=source, model=calibration.model.fingerprint, ranges=tuple(ranges), beyond=tuple(_beyond(calibration))
    )


def _beyond(calibration: Calibration) -> list[Pick]:
    """Picks for prompts longer than any measured: by loss at the longest length, until one is bounded at any length.

    Frequency strategies keep true distances, so none of them stays inside the window.
    """
    last = calibration.lengths[-1]
    picks: list[Pick] = []
    for name, choice in _reading_everything(calibration, last):
        able = strategies()[name].capabilities
        if not picks or not able.changes_frequencies:
            picks.append(_pick(name, choice, last, calibration.native[last].loss, []))
        if able.bounded:
            break
    return picks


def _reading_everything(calibration: Calibration, length: int) -> list[tuple[str, Choice]]:
    """Measured strategies that attend to every key, best first."""
    ranked = calibration.ranked(length)
    return [(name, choice) for name, choice in ranked if not strategies()[name].capabilities.drops_keys]


def find_profile(model: Fingerprint) -> Path | None:
    """The calibration file of a model that ships with posenc, by its fingerprint."""
    for path in sorted((Path(__file__).parents[1] / "profiles").glob("*.yaml")):
        if read(path).model.fingerprint == model:
            return path
    return None


def no_calibration(what: str) -> InvalidConfigError:
    """The error of ``auto`` without a file."""
    return InvalidConfigError(
        f"auto.calibration: {what}. 'posenc calibrate MODEL' measures one; pass its file as calibration=FILE."
    )


def _surely_better(choice: Choice) -> bool:
    return choice.calibration.clearly_better and (choice.report is None or choice.report.clearly_better)


def _pick(name: str, choice: Choice, length: int, native: float, others: list[tuple[str, Choice]]) -> Pick:
    score = choice.calibration
    because = (
        f"{score.loss:.3f} nats per token at {length} tokens over {score.documents} documents, native {native:.3f}"
    )
    if others:
        because += f"; next: {others[0][0]} {others[0][1].calibration.loss:.3f}"
    return Pick(strategy=name, params=choice.params, because=because)
