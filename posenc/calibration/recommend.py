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
    """A strategy with its parameters, and the measurement it was picked for."""

    strategy: str
    params: dict[str, Any] = Field({})
    because: str

    def make(self, window: int | None) -> PositionStrategy:
        """Make the strategy, for a pretraining window in tokens."""
        if self.strategy == NATIVE:
            return IdentityStrategy(window=window, **self.params)
        return named_strategy(self.strategy, window=window, **self.params)

    def __str__(self) -> str:
        return f"{self.strategy}({', '.join(f'{key}={value}' for key, value in self.params.items())})"


class LengthRange(StrictModel):
    """The pick for prompts of up to ``up_to`` tokens."""

    up_to: PositiveInt
    pick: Pick


class Recommendation(StrictModel):
    """The recommendation for every prompt length, short enough to be part of a configuration.

    Parameters
    ----------
    source : str
        The calibration file it was read from.
    model : Fingerprint, optional
        The model it was measured on; None if the picks were written by hand.
    ranges : tuple of LengthRange
        By ascending length. A prompt gets the pick of the shortest measured length that is at least its own.
    beyond : tuple of Pick
        Picks for prompts longer than any measured length, of which the first whose plan stays inside the window is
        used, else the first.
    """

    source: str = "written by hand"
    model: Fingerprint | None = None
    ranges: tuple[LengthRange, ...] = Field(min_length=1)
    beyond: tuple[Pick, ...] = ()

    def check_model(self, model: Fingerprint) -> None:
        """Raise InvalidConfigError if ``model`` is not the model that was measured."""
        if self.model is not None:
            check_same_model(self.model, model, source=self.source)


def read_recommendation(path: str | Path) -> Recommendation:
    """The recommendation of a calibration file; raises as :func:`posenc.calibration.file.read` does."""
    return recommend(read(path), source=str(path))


def recommend(calibration: Calibration, *, source: str) -> Recommendation:
    """Turn measurements into a recommendation.

    Inside the window it is the identity, unless a strategy is better by more than two standard errors of the paired
    difference, both on the calibration texts and on the report texts if there are any: the best of many candidates may
    look good by chance. Beyond the window it is the strategy with the lowest mean loss on the calibration texts, or the
    identity if none is better. Strategies that drop keys are never recommended, because perplexity hardly shows what
    they no longer attend.
    """
    window = calibration.model.fingerprint.window
    ranges = []
    if calibration.lengths[0] > window:
        because = f"nothing was measured inside the window of {window} tokens, so the model is not changed"
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
            pick = Pick(strategy=NATIVE, because=f"{idle} than the model alone, {native.loss:.3f} nats per token")
        ranges.append(LengthRange(up_to=length, pick=pick))
    return Recommendation(
        source=source, model=calibration.model.fingerprint, ranges=tuple(ranges), beyond=tuple(_beyond(calibration))
    )


def _beyond(calibration: Calibration) -> list[Pick]:
    """Picks for prompts longer than any measured length, by their loss at the longest one, up to the first bounded one.

    Frequency strategies keep true distances, so only the first pick may be one.
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
    """Measured strategies that attend every key, best first."""
    ranked = calibration.ranked(length)
    return [(name, choice) for name, choice in ranked if not strategies()[name].capabilities.drops_keys]


def find_profile(model: Fingerprint) -> Path | None:
    """The calibration file that ships with posenc for a model with this fingerprint, or None."""
    for path in sorted((Path(__file__).parents[1] / "profiles").glob("*.yaml")):
        if read(path).model.fingerprint == model:
            return path
    return None


def no_calibration(reason: str) -> InvalidConfigError:
    """The error of ``auto`` without a calibration file."""
    return InvalidConfigError(
        f"auto.calibration: {reason}. 'posenc calibrate MODEL' measures one; pass its file as calibration=FILE."
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
