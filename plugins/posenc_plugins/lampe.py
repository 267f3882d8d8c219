"""LaMPE: Zhang et al. 2025, "LaMPE: Length-aware Multi-grained Positional Encoding for Adaptive Long-context
Scaling Without Training", arXiv 2508.02308."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from posenc.calibration.candidates import parts
from posenc.params import Capabilities, RemapParams
from posenc.plan import PositionPlan
from posenc.positions import PositionStrategy
from posenc.segment import IntArray, Lengths, Segment
from posenc_plugins.lampe_mapping import (
    OFFICIAL_SHORT,
    PROFILE_WINDOWS,
    PROFILES,
    MappingCurve,
    NamedMapping,
    check_mapping,
    fallback,
    named_mapping,
)

if TYPE_CHECKING:
    from posenc.params import Fingerprint

logger = logging.getLogger("posenc")


class LampeParams(RemapParams):
    """Parameters of :class:`Lampe`."""

    head: PositiveInt | None = Field(None, description="H, distances kept as they are (default: window / 16)")
    tail: NonNegativeInt | None = Field(
        None, description="T, first keys whose distances keep exact steps (default: min(200, window / 20))"
    )
    mapping: int | str | MappingCurve | None = Field(
        None,
        description="U, positions that a prompt is mapped to: profile name, constant, {c, a, b} or calibration file",
    )
    attention_factor: float = Field(
        0.1 * math.log(2) + 1, gt=0, allow_inf_nan=False, description="factor on q and on k; logits get its square"
    )
    granularity: Literal["full", "uniform", "head_only"] = Field(
        "full", description="ablation: 'full' has head, middle and tail, 'uniform' the middle only, 'head_only' no tail"
    )
    continuity: bool = Field(True, description="ablation: False omits the offsets that join the three parts")
    compat: Literal["paper", "official"] = Field(
        "paper", description="'official' reproduces the arithmetic of the published code, rounding included"
    )

    @field_validator("mapping", mode="before")
    @classmethod
    def _check_mapping(cls, value: Any) -> int | str | MappingCurve | None:
        return check_mapping(value)


@dataclass(frozen=True)
class Split:
    """The parts of a prompt, ``d < head``, ``head <= d < far`` and ``d >= far``, and the offsets that join them."""

    mapping_length: int
    far: int
    tail_start: int
    middle_offset: int
    tail_offset: int


class Lampe(PositionStrategy):
    """Exact distances near the query, exact steps at the start of the text, compression between them (section 3).

    Names of the paper: ``H`` head, ``T`` tail, ``U`` mapping length, ``R`` tail start, ``b1`` and
    ``b2`` the offsets that keep the relative position continuous across the borders.

    Raises
    ------
    InvalidConfigError
        If a parameter is wrong, a file that ``mapping`` names cannot be used, or a default needs an unknown window.
    """

    name = "lampe"
    summary = "length-aware compression of the middle, exact head and tail"
    paper = "Zhang et al. 2025, LaMPE, arXiv 2508.02308"
    Params = LampeParams
    capabilities = Capabilities(bounded=True, uses_prompt=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self._measured = self._read_measured()
        head, tail = self._given_or_measured("head"), self._given_or_measured("tail")
        self.head = self.tokens("head", 1 / 16) if head is None else head
        self.tail = max(1, min(200, self.require_window("tail") // 20)) if tail is None else tail
        self.official = self.params.compat == "official"
        self._mapping = self._read_mapping()

    def _read_measured(self) -> NamedMapping | None:
        """The profile or calibration file that ``mapping`` names; None if it is not a name."""
        mapping = self.params.mapping
        return named_mapping(mapping, key="lampe.mapping") if isinstance(mapping, str) else None

    def _given_or_measured(self, key: str) -> int | None:
        """The parameter, or that of the calibration file: a curve is valid for the head it was measured with."""
        value: int | None = getattr(self.params, key)
        return getattr(self._measured, key) if value is None and self._measured is not None else value

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        if self._measured is not None and self._measured.model is not None:
            self._measured.check_model(fingerprint())
        profile_window = PROFILE_WINDOWS.get(str(self.params.mapping))
        if profile_window is not None and self.window not in (None, profile_window):
            logger.warning(
                "lampe: the profile %r was fitted for a model with a window of %d tokens, and this one has %d. Omit "
                "mapping to get a curve for the model's own window, or fit one with 'posenc calibrate'.",
                self.params.mapping,
                profile_window,
                self.window,
            )
        return self

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [
            {"head": head, "mapping": mapping}
            for head in parts(window, 0.5, 1, 2, 4)
            for mapping in parts(window, 1, 2, 3, 4, 5, 6)
        ]

    def _read_mapping(self) -> int | MappingCurve:
        mapping: int | str | MappingCurve | None = self.params.mapping
        if mapping is None:
            curve = fallback(self.require_window("mapping"))
            logger.warning(
                "lampe: no mapping given, using llama3's curve rescaled to a window of %d tokens. "
                "'posenc calibrate' fits a curve to the model; pass its file as mapping=FILE.",
                self.window,
            )
            return curve
        if isinstance(mapping, str):
            assert self._measured is not None
            return self._measured.curve
        return mapping

    def mapping_length(self, prompt: int) -> int:
        """``U``, the number of positions that a prompt of ``prompt`` tokens is mapped to."""
        if isinstance(self._mapping, int):
            return self._mapping
        if self.official and prompt < 8192 and self.params.mapping in OFFICIAL_SHORT:
            return OFFICIAL_SHORT[self.params.mapping]
        return self._mapping(prompt)

    def mapped(self, index: IntArray, prompt: int, mapping_length: int) -> IntArray:
        """``m(p)``: ``U p // (P - 1)``, or the float32 form of the published code, constant from ``P - 1`` on."""
        if not self.official:
            return mapping_length * index // (prompt - 1)
        step = np.float32(1) / np.float32(prompt - 1) * np.float32(mapping_length)
        inside = np.minimum(index, prompt - 1).astype(np.float32)
        mapped: IntArray = np.floor(step * inside).astype(np.int64)
        return mapped

    def split(self, prompt: int) -> Split | None:
        """Borders and offsets for a prompt, or None if the method is inactive at this length."""
        head, mapping_length = self.head, self.mapping_length(prompt)
        if prompt < 2 * head or (not self.official and mapping_length >= prompt - 1):
            return None
        start = self._tail_start(prompt, mapping_length)
        if prompt - start <= head and self.params.granularity == "full" and not self.official:
            return None
        far = max(prompt - start, head)
        if not self.params.continuity:
            return Split(mapping_length, far, start, 0, 0)
        at = self.mapped(np.array([head, prompt - 1 - start]), prompt, mapping_length)
        middle_offset = head - int(at[0]) - 1
        return Split(mapping_length, far, start, middle_offset, prompt - 1 - start - int(at[1]) - middle_offset)

    def _tail_start(self, prompt: int, mapping_length: int) -> int:
        """``R = max{r : m(r) == m(T)}``, at most ``P - 1`` because no key of the prompt lies beyond."""
        if self.official:
            mapped = self.mapped(np.arange(prompt, dtype=np.int64), prompt, mapping_length)
            return int(np.searchsorted(mapped, mapped[min(self.tail, prompt - 1)], side="right")) - 1
        if mapping_length == 0:
            return prompt - 1
        shared = mapping_length * self.tail // (prompt - 1)
        return min(((shared + 1) * (prompt - 1) - 1) // mapping_length, prompt - 1)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        split = self.split(lengths.prompt)
        if split is None:
            return PositionPlan.identity(lengths).segments
        total, index, head = lengths.total, lengths.indices, self.head
        mapped = self.mapped(index, lengths.prompt, split.mapping_length)
        if self.params.granularity == "uniform":
            return (Segment.band("middle", total, 0, None, mapped, mapped),)
        near = Segment.band("head", total, 0, head, index, index)
        shifted = mapped + split.middle_offset
        if self.params.granularity == "head_only":
            return near, Segment.band("middle", total, head, None, shifted, mapped)
        tail = Segment.band("tail", total, split.far, None, index - split.tail_offset, index)
        middle = Segment("middle", tail.key_stop, near.key_start, shifted, mapped)  # all keys between the two
        return near, middle, tail

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        if not self.official and self.split(lengths.prompt) is None:
            return None
        return np.full(lengths.total, self.params.attention_factor**2)

    @property
    def replan(self) -> str | int:
        return "never" if self.official else super().replan

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        mapping = self.params.mapping
        if isinstance(mapping, str) and mapping not in PROFILES and isinstance(self._mapping, MappingCurve):
            # by value, because the file may not be there when the strategy is built again
            described["mapping"] = self._mapping.model_dump()
            described |= {key: value for key in ("head", "tail") if (value := self._given_or_measured(key)) is not None}
        return described
