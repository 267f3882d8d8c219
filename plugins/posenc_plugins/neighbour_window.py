"""Bases of the strategies that keep distances below a near window exact and differ in how they treat farther keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from posenc.calibration.candidates import parts
from posenc.params import RemapParams, Retention
from posenc.positions import PositionStrategy, log_length_scale
from posenc.segment import IntArray, Lengths, Segment


class NeighbourWindowParams(RemapParams):
    """Parameters of a near window that is an eighth of the pretraining window unless it is given."""

    window_size: PositiveInt | None = Field(None, description="w, distances kept as they are (default: window / 8)")


class NeighbourWindow(PositionStrategy):
    """Two segments: keys at ``d < window_size`` keep their true distance, :meth:`beyond` places the others.

    The parameter ``window_size`` counts tokens; its default is ``default_share`` of the pretraining window.
    """

    Params = NeighbourWindowParams
    default_share: ClassVar[float] = 1 / 8
    near_name: ClassVar[str] = "window"

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.window_size = self.tokens("window_size", self.default_share)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index = lengths.indices
        return self.near(index), self.beyond(index)

    def near(self, index: IntArray) -> Segment:
        """The segment of the exact distances; ``index`` is ``0 .. total - 1``."""
        return Segment.band(self.near_name, len(index), 0, self.window_size, index, index)

    @abstractmethod
    def beyond(self, index: IntArray) -> Segment:
        """The segment of the farther keys."""


class ScaledNeighbourWindow(NeighbourWindow):
    """A near window whose strategy may scale logits by the logarithm of the length (parameter ``log_scale``).

    With ``log_scale=None`` they are scaled if the pretraining window is known.
    """

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        log_scale: bool | None = self.params.log_scale
        self.scale_window = window if log_scale is None else self.require_window("log_scale") if log_scale else None

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        if self.scale_window is None:
            return None
        scale = log_length_scale(lengths, self.scale_window)
        scale[: self.window_size] = 1.0  # a prompt inside the near window is unchanged, whatever the pretraining window
        return scale


class SinkWindowParams(NeighbourWindowParams):
    """Parameters of a near window and attention sinks, the only keys that are attended."""

    window_size: PositiveInt | None = Field(None, description="W, nearest keys that are attended (default: window / 2)")
    sinks: NonNegativeInt = Field(4, description="s, first keys that stay attended")


class SinkWindow(NeighbourWindow):
    """Only the near window and the first ``sinks`` keys are attended, so a cache needs no others."""

    Params = SinkWindowParams
    default_share = 1 / 2

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        sizes = parts(window, 1, 2, 3, 4, 5, 6, 7, 8)
        return [{"window_size": size, "sinks": sinks} for size in sizes for sinks in (0, 4, 16)]

    @property
    def retention(self) -> Retention:
        return Retention(self.params.sinks, self.window_size)
