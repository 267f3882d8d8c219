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
        None, description="T, first keys seen at exact steps again (default: min(200, window / 20))"
    )
    mapping: int | str | MappingCurve | None = Field(
        None, description="U, positions to spread a prompt over: profile name, constant, {c, a, b} or calibration file"
    )
    attention_factor: float = Field(
        0.1 * math.log(2) + 1, gt=0, allow_inf_nan=False, description="factor on q and on k; logits grow by its square"
    )
    granularity: Literal["full", "uniform", "head_only"] = Field(
        "full", description="ablation: head, middle and tail; the middle alone; or head and middle"
    )
    continuity: bool = Field(True, description="ablation: False drops the offsets that join the three parts")
    compat: Literal["paper", "official"] = Field(
        "paper", description="'official' repeats the arithmetic of the published code, its rounding included"
    )

    @field_validator("mapping", mode="before")
    @classmethod
    def _check_mapping(cls, value: Any) -> int | str | MappingCurve | None:
        return check_mapping(value)


@dataclass(frozen=True)
class Split:
    """How a prompt is divided: ``d < head``, ``head <= d < far``, ``d >= far``, and the offsets that join them."""

    mapping_length: int
    far: int
    tail_start: int
    middle_offset: int
    tail_offset: int


class Lampe(PositionStrategy):
    """Exact near the query, exact at the start of the text, compressed to a fitted length between (section 3).

    Names of the paper: ``H`` head, ``T`` tail, ``U`` mapping length, ``R`` tail start, ``b1`` and
    ``b2`` the offsets that keep the relative position continuous across the borders.
    """

    name = "lampe"
    summary = "length-aware compression of the middle, exact head and tail"
    paper = "Zhang et al. 2025, LaMPE, arXiv 2508.02308"
    Params = LampeParams
    capabilities = Capabilities(bounded=True, uses_prompt=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self._measured = self._read_measured()
        head, tail = self._beside_the_curve("head"), self._beside_the_curve("tail")
        self.head = self.tokens("head", 1 / 16) if head is None else head
        self.tail = max(1, min(200, self.require_window("tail") // 20)) if tail is None else tail
        self.official = self.params.compat == "official"
        self._mapping = self._read_mapping()

    def _read_measured(self) -> NamedMapping | None:
        """The profile or file that ``mapping`` names."""
        given = self.params.mapping
        return named_mapping(given, key="lampe.mapping") if isinstance(given, str) else None

    def _beside_the_curve(self, key: str) -> int | None:
        """A parameter as given, else as the file has it: a curve holds for the head it was measured with."""
        given: int | None = getattr(self.params, key)
        return getattr(self._measured, key) if given is None and self._measured is not None else given

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        if self._measured is not None and self._measured.model is not None:
            self._measured.check_model(fingerprint())
        fitted_for = PROFILE_WINDOWS.get(str(self.params.mapping))
        if fitted_for is not None and self.window not in (None, fitted_for):
            logger.warning(
                "lampe: the profile %r was fitted for a model with a window of %d tokens, and this one has %d. Leave "
                "mapping out for a curve at the model's own window, or fit one with 'posenc calibrate'.",
                self.params.mapping,
                fitted_for,
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
        given: int | str | MappingCurve | None = self.params.mapping
        if given is None:
            curve = fallback(self.require_window("mapping"))
            logger.warning(
                "lampe: no mapping given, using llama3's curve rescaled to a window of %d tokens. "
                "'posenc calibrate' fits one to the model; pass it as mapping=FILE.",
                self.window,
            )
            return curve
        if isinstance(given, str):
            assert self._measured is not None
            return self._measured.curve
        return given

    def mapping_length(self, prompt: int) -> int:
        """``U``, the positions a prompt of ``prompt`` tokens is spread over."""
        if isinstance(self._mapping, int):
            return self._mapping
        if self.official and prompt < 8192 and self.params.mapping in OFFICIAL_SHORT:
            return OFFICIAL_SHORT[self.params.mapping]
        return self._mapping(prompt)

    def mapped(self, index: IntArray, prompt: int, mapping_length: int) -> IntArray:
        """``m(p)``: ``U p // (P - 1)``, or the published float32 form of it, frozen at ``P - 1``."""
        if not self.official:
            return mapping_length * index // (prompt - 1)
        step = np.float32(1) / np.float32(prompt - 1) * np.float32(mapping_length)
        frozen = np.minimum(index, prompt - 1).astype(np.float32)
        mapped: IntArray = np.floor(step * frozen).astype(np.int64)
        return mapped

    def split(self, prompt: int) -> Split | None:
        """Borders and offsets for a prompt, or None while the method is inactive."""
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
        middle = Segment("middle", tail.key_stop, near.key_start, shifted, mapped)  # all that lies between them
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
        given = self.params.mapping
        if isinstance(given, str) and given not in PROFILES and isinstance(self._mapping, MappingCurve):
            described["mapping"] = self._mapping.model_dump()  # the file may not travel with the model
            described |= {key: value for key in ("head", "tail") if (value := self._beside_the_curve(key)) is not None}
        return described
