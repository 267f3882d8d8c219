"""The strategy seam: lengths in, plan out. A new paper is one subclass of PositionStrategy."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidConfigError, InvalidInputError, PluginError, PosencError
from posenc.params import Capabilities, Params, RemapParams, Retention, read_params
from posenc.plan import PositionPlan
from posenc.segment import Lengths, Segment, check_columns

if TYPE_CHECKING:
    from posenc.params import Fingerprint
    from posenc.rope import Rotary


SOME_WINDOW = 512
"""The window, in tokens, that a strategy is tried with if none is known."""


class PositionStrategy(ABC):
    """Maps lengths to a plan (and, for frequency strategies, a rotary to a rotary).

    Subclasses set the class attributes and implement :meth:`segments`. They know nothing of models
    or kernels.

    Parameters
    ----------
    window : int, optional
        Pretraining window ``n`` of the model, in tokens. Defaults that are fractions of ``n`` need it.
    **params
        Fields of the class attribute ``Params``.

    Raises
    ------
    InvalidConfigError
        If a parameter is unknown or out of range, or a default needs the window and none was given.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Params: ClassVar[type[Params]] = RemapParams
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise InvalidConfigError(f"{self.name}.window: must be a positive number of tokens, got {window!r}.")
        self.window = window
        self.params: Any = read_params(self.Params, params, path=self.name)

    @abstractmethod
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        """Segments that partition the causal plane of ``lengths.total`` tokens; empty ones are dropped."""

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        """Factor on the logits of each query, float64 [total], or None."""
        return None

    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        """Build the plan for a prompt of ``prompt`` tokens, ``total`` tokens present (default: the prompt).

        Raises
        ------
        InvalidInputError
            Unless ``total >= prompt >= 1``.
        PluginError
            If :meth:`segments` or :meth:`query_scale` fails.
        """
        lengths = Lengths(prompt, prompt if total is None else total)
        if prompt <= self.active_from:
            return PositionPlan.identity(lengths, window=self.window, strategy=self.name)
        try:
            segments, scale = self.segments(lengths), self.query_scale(lengths)
            if isinstance(segments, Iterator):  # run a generator here, so that its errors name the strategy too
                segments = tuple(segments)
        except PosencError:
            raise
        except Exception as error:
            raise PluginError(
                f"strategy {self.name!r} (module {type(self).__module__}) fails to plan {_shown(lengths)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            return PositionPlan.build(lengths, segments, query_scale=scale, window=self.window, strategy=self.name)
        except InvalidInputError as error:
            raise self._wrong_plan(lengths, error) from None

    def checked_plan(self, prompt: int, total: int | None = None, *, frequencies: int | None = None) -> PositionPlan:
        """The plan, with its arrays and its partition checked.

        Parameters
        ----------
        prompt, total : int
            Lengths in tokens.
        frequencies : int, optional
            How many rotary frequencies the model has, where there is one.

        Raises
        ------
        PluginError
            If the plan is wrong; the message names the strategy, and the segment or the first pair that is wrong.
        """
        plan = self.plan(prompt, total)
        lengths = Lengths(prompt, prompt if total is None else total)
        if not isinstance(plan, PositionPlan):
            raise self._wrong_plan(lengths, f"plan() must return a PositionPlan, got {plan!r:.100}.")
        if (plan.prompt, plan.total) != (lengths.prompt, lengths.total):
            raise self._wrong_plan(lengths, f"it is a plan for {_shown(plan)}.")
        try:
            plan.check(drops_keys=self.capabilities.drops_keys)
            self._check_columns(plan, frequencies)
        except InvalidInputError as error:
            raise self._wrong_plan(lengths, error) from None
        return plan

    def _check_columns(self, plan: PositionPlan, frequencies: int | None) -> None:
        for segment in () if self.capabilities.positions_per_frequency else plan.segments:
            if max(segment.query_positions.ndim, segment.key_positions.ndim) > 1:
                raise InvalidInputError(
                    f"segment {segment.name!r} has positions with columns. A column is one rotary frequency (heads "
                    "share their positions); a strategy that means this declares "
                    "Capabilities(positions_per_frequency=True)."
                )
        check_columns(plan.segments, frequencies)

    def _wrong_plan(self, lengths: Lengths, why: object) -> PluginError:
        return PluginError(f"strategy {self.name!r} made a wrong plan ({_shown(lengths)}): {why}")

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        """Frequencies to use for a prompt of ``prompt`` tokens; remapping strategies return ``base``."""
        return base

    def checked_rotary(self, base: Rotary, prompt: int) -> Rotary:
        """The frequencies for a prompt, checked against the model's own.

        Raises
        ------
        PluginError
            If :meth:`rotary` fails, if its result is not a finite Rotary of the same layout, or if it changes ``base``
            although that is not declared.
        """
        from posenc.rope import fault_of

        where = f"strategy {self.name!r}: rotary(base, {prompt})"
        try:
            rotary = self.rotary(base, prompt)
        except PosencError:
            raise
        except Exception as error:
            raise PluginError(f"{where} fails: {type(error).__name__}: {error}") from error
        fault = fault_of(rotary, base, changes=self.capabilities.changes_frequencies)
        if fault is not None:
            raise PluginError(f"{where} {fault}")
        return rotary

    def check_frequencies(self, base: Rotary) -> None:
        """Compute the frequencies of a few prompts, so that ``apply`` refuses a model that this strategy cannot serve.

        Parameters
        ----------
        base : Rotary
            The model's own frequencies.

        Raises
        ------
        PluginError
            If they are wrong, or depend on the prompt although that is not declared.
        InvalidConfigError
            If the strategy cannot start from them.
        """
        from posenc.rope import same_frequencies

        window = self.window or SOME_WINDOW
        first = self.checked_rotary(base, 1)
        for prompt in (window, window + 1, 4 * window):
            rotary = self.checked_rotary(base, prompt)
            if not self.capabilities.frequencies_by_length and not same_frequencies(rotary, first):
                raise PluginError(
                    f"strategy {self.name!r}: rotary(base, {prompt}) and rotary(base, 1) differ, but "
                    "Capabilities(frequencies_by_length=True) is not declared."
                )

    def for_frequencies(self, count: int) -> PositionStrategy:
        """The strategy for a model with ``count`` rotary frequencies (``rotary_dim // 2``).

        ``apply`` calls this after it has measured the model, and then :meth:`for_layer` on the result. A strategy whose
        positions differ by frequency checks here that its parameters fit the number.

        Raises
        ------
        InvalidConfigError
            If the parameters do not fit.
        """
        return self

    def for_layer(self, layer: int, layers: int) -> PositionStrategy:
        """The strategy of one attention layer; override it if layers see different positions.

        Parameters
        ----------
        layer : int
            Which attention layer, ``0 .. layers - 1`` in the order of the forward pass.
        layers : int
            How many attention layers the model has.

        Returns
        -------
        PositionStrategy
            ``self`` unless overridden. Layers whose strategies have equal descriptions share their plans; a row
            re-plans when any of its layers must.
        """
        return self

    @property
    def retention(self) -> Retention | None:
        """Which keys a cache must keep, or None if any key may be attended again."""
        return None

    @property
    def active_from(self) -> int:
        """Longest prompt, in tokens, that gets the identity plan; 0 where every prompt gets the strategy's own."""
        value: int = getattr(self.params, "active_from", 0)
        return value

    @property
    def follows_prompt(self) -> bool:
        """True where the plan or the frequencies depend on the prompt's length.

        The same first tokens then have other keys and values in a longer prompt, so requests cannot share them, and a
        cache that forgets how long the text is cannot serve the strategy.
        """
        able = self.capabilities
        return able.uses_prompt or able.frequencies_by_length or self.active_from > 0

    @property
    def replan(self) -> str | int:
        """When a handle re-plans during long generation: ``"auto"``, ``"never"`` or every k tokens."""
        value: str | int = getattr(self.params, "replan", "auto")
        return value

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        """Parameters that ``posenc calibrate`` tries for inputs of ``length`` tokens; empty if there are none."""
        return ()

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        """The strategy to use on a model; ``apply`` calls this before it patches anything.

        Strategies with measured parameters override this to refuse another model. ``fingerprint`` hashes the weights
        only when it is called, so strategies that do not need it cost nothing.
        """
        return self

    def tokens(self, key: str, default: float) -> int:
        """Parameter ``key`` in tokens; if it is None, ``default`` times the window (at least 1)."""
        value: int | None = getattr(self.params, key)
        if value is None:
            value = max(1, int(self.require_window(key) * default))
        return value

    def require_window(self, key: str) -> int:
        """The window; raises InvalidConfigError, naming the parameter that needs it, if it is not known."""
        if self.window is None:
            raise InvalidConfigError(
                f"{self.name}.{key}: its default is a fraction of the pretraining window, which is not known "
                f"here. Pass window=... (in tokens) or set {key}."
            )
        return self.window

    def describe(self) -> dict[str, Any]:
        """Name and parameters as plain data, enough to build the strategy again."""
        return {"name": self.name, **self.params.model_dump(exclude_defaults=True)}

    @property
    def fingerprint(self) -> str:
        """Window, name and parameters as text; strategies with equal text make equal plans."""
        return json.dumps({**self.describe(), "window": self.window}, sort_keys=True, default=str)

    def __repr__(self) -> str:
        shown = {"window": self.window, **self.params.model_dump(exclude_defaults=True)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


class IdentityStrategy(PositionStrategy):
    """Plain RoPE: every pair at its true distance (Su et al. 2021, RoFormer, arXiv 2104.09864, section 3.2.2).

    The unmodified model. Code that needs the identity uses this class instead of the registry, so that a plugin that
    claims the name ``rope`` breaks nothing.
    """

    name = "rope"
    summary = "plain RoPE, the model as it is"
    paper = "Su et al. 2021, RoFormer, arXiv 2104.09864"

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return PositionPlan.identity(lengths).segments


class FrequencyStrategy(PositionStrategy):
    """A strategy that keeps the positions and changes ``inv_freq`` and the cos/sin factor."""

    Params = Params
    capabilities = Capabilities(changes_frequencies=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return PositionPlan.identity(lengths).segments

    @abstractmethod
    def rotary(self, base: Rotary, prompt: int) -> Rotary: ...


def _shown(lengths: Lengths | PositionPlan) -> str:
    return f"prompt {lengths.prompt}, total {lengths.total}"


def log_length_scale(lengths: Lengths, window: int) -> NDArray[np.float64]:
    """``max(1, ln(i + 1) / ln(window))`` for every query, float64 [total]."""
    scale: NDArray[np.float64] = np.log(lengths.indices + 1.0) / np.log(max(window, 2))
    return np.maximum(scale, 1.0, out=scale)
