"""Rotary embeddings: cos and sin of positions, and the rotation of queries and keys.

Shape letters: B batch, H heads, L tokens, D head_dim, F rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from posenc.derived import Arguments, Derivable, Value
from posenc.errors import InvalidInputError
from posenc.rope.types import geometric
from posenc.segment import Interpolation

Style = Literal["half", "interleaved"]
Arithmetic = Literal["native", "mixed", "float32", "complex"]


@dataclass(frozen=True, eq=False)
class Rotary(Derivable):
    """Frequencies and layout of a rotary embedding.

    Rotaries of equal numbers are equal, so that what is kept for one serves the other. Writing to ``inv_freq`` in place
    makes it another rotary from then on; only writes through ``.data`` or numpy go unnoticed.

    Parameters
    ----------
    inv_freq : float [F]
        Inverse frequencies in radians per token.
    attention_scaling : float
        Factor on cos and sin (YaRN and others), so logits scale with its square.
    style : {"half", "interleaved"}
        ``half`` pairs channel ``c`` with ``c + F`` (Llama), ``interleaved`` pairs ``2c`` with ``2c + 1``.
    channels : (int, int), optional
        Half-open range of head channels that are rotated, ``2 F`` wide; default the first ``2 F``.
    theta : float, optional
        Base of the geometric frequencies before any scaling, where known.
    arithmetic : {"native", "mixed", "float32", "complex"}
        How :meth:`rotate_as_stock` rounds: tables and products in the dtype of the tensor; such tables
        but float32 products; both in float32; or float32 products of complex numbers.
    scaling : str
        The checkpoint's own scaling that is part of ``inv_freq``, by transformers' name of the rope type;
        ``"default"`` where it declares none. Frequency strategies that need unscaled frequencies look here.

    Raises
    ------
    InvalidInputError
        If the shapes do not fit together.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0
    style: Style = "half"
    channels: tuple[int, int] | None = None
    theta: float | None = None
    arithmetic: Arithmetic = "native"
    scaling: str = "default"

    def __post_init__(self) -> None:
        inv_freq = torch.as_tensor(self.inv_freq)
        if inv_freq.is_inference():  # it is kept, and a later forward may need a gradient
            with torch.inference_mode(False):
                inv_freq = inv_freq.clone()
        object.__setattr__(self, "inv_freq", inv_freq)
        if self.inv_freq.ndim != 1 or not len(self.inv_freq):
            raise InvalidInputError(f"Rotary.inv_freq must be a vector, got shape {tuple(self.inv_freq.shape)}.")
        if self.inv_freq.is_complex():
            raise InvalidInputError(f"Rotary.inv_freq must hold real numbers, got {self.inv_freq.dtype}.")
        for name, kinds in (("style", Style), ("arithmetic", Arithmetic)):
            if getattr(self, name) not in get_args(kinds):
                choices = " or ".join(repr(kind) for kind in get_args(kinds))
                raise InvalidInputError(f"Rotary.{name} must be {choices}, got {getattr(self, name)!r}.")
        if not math.isfinite(self.attention_scaling):
            raise InvalidInputError(f"Rotary.attention_scaling must be finite, got {self.attention_scaling!r}.")
        start, stop = self.rotated
        if start < 0 or stop - start != 2 * len(self.inv_freq):
            raise InvalidInputError(
                f"Rotary.channels={self.channels} must span 2 * len(inv_freq) = {2 * len(self.inv_freq)} channels."
            )

    @classmethod
    def from_theta(cls, theta: float, dim: int, **kwargs: Any) -> Rotary:
        """Plain RoPE frequencies ``theta ** (-2 c / dim)`` (Su et al. 2021, RoFormer, section 3.2.2)."""
        if dim < 2 or dim % 2:
            raise InvalidInputError(f"dim must be even and at least 2, got {dim}.")
        inv_freq = geometric(theta, dim)
        return cls(inv_freq, theta=float(theta), **kwargs)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rotary) and self.key == other.key)

    def __hash__(self) -> int:
        return self._keyed()[2]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_last_key"}

    def derived(self, make: Callable[[Self, *Arguments], Value], *arguments: *Arguments) -> Value:
        """``make(self, *arguments)``, computed once for each state of ``inv_freq``: see :meth:`Derivable.derived`."""
        return self._keep((make, self.key, *arguments), make, *arguments)

    @property
    def key(self) -> tuple[Any, ...]:
        """The numbers that tell rotaries apart; read from the device once per state of ``inv_freq``."""
        return self._keyed()[1]

    def _keyed(self) -> tuple[int, tuple[Any, ...], int]:
        """The version of ``inv_freq``, the key, and its hash, kept because every layer of every step asks for them."""
        version = self.inv_freq._version
        keyed: tuple[int, tuple[Any, ...], int] | None = self.__dict__.get("_last_key")
        if keyed is None or keyed[0] != version:
            meta = self.inv_freq.device.type == "meta"
            values = id(self) if meta else self.inv_freq.detach().double().cpu().numpy().tobytes()
            key = (values, self.attention_scaling, self.style, self.rotated, self.theta, self.arithmetic, self.scaling)
            keyed = (version, key, hash(key))
            object.__setattr__(self, "_last_key", keyed)
        return keyed

    def check_values(self) -> None:
        """Raise InvalidInputError where a frequency is not a finite number."""
        values = self.key[0]
        if isinstance(values, bytes) and not np.isfinite(np.frombuffer(values)).all():
            raise InvalidInputError(
                "Rotary.inv_freq holds a NaN or an infinity: its model's weights are not loaded, or theta is wrong."
            )

    @property
    def rotated(self) -> tuple[int, int]:
        """Half-open range of rotated head channels."""
        return self.channels if self.channels is not None else (0, 2 * len(self.inv_freq))

    def with_frequencies(self, inv_freq: Tensor, attention_scaling: float) -> Rotary:
        """The same layout with other frequencies."""
        return replace(self, inv_freq=inv_freq, attention_scaling=attention_scaling)

    def with_wide_tables(self) -> Rotary:
        """The same for a model whose cos and sin are wider than its queries, and so are its products."""
        return self if self.arithmetic == "complex" else replace(self, arithmetic="float32")

    def tables(
        self,
        positions: Any,
        *,
        interpolation: Interpolation = "positions",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the given positions; angles are float64, so long positions stay exact.

        Parameters
        ----------
        positions : int or float, [L] or [L, F]
            Rotary positions, fractional and negative ones included.
        interpolation : {"positions", "logits"}
            With ``"logits"`` the tables of a fraction are those of the whole numbers beside it, mixed linearly. A
            rotation is linear in them, and a logit in the rotated key, so this interpolates the logits (Li et al.
            2025, GALI).

        Returns
        -------
        (Tensor, Tensor)
            cos and sin, each [L, F] of ``dtype``, ``attention_scaling`` included.

        Raises
        ------
        InvalidInputError
            If positions of two dimensions do not hold one for each of the F frequencies.
        """
        self.check_positions(np.shape(positions))
        position = torch.as_tensor(np.ascontiguousarray(positions)).to(device=device, dtype=torch.float64)
        position = position if position.ndim == 2 else position[:, None]
        inv_freq = self.inv_freq.to(device).double()
        if interpolation == "logits":
            lower, share = position.floor(), position - position.floor()
            below, above = lower * inv_freq, (lower + 1) * inv_freq
            cos, sin = torch.lerp(below.cos(), above.cos(), share), torch.lerp(below.sin(), above.sin(), share)
        else:
            angle_LF = position * inv_freq
            cos, sin = angle_LF.cos(), angle_LF.sin()
        return (cos * self.attention_scaling).to(dtype), (sin * self.attention_scaling).to(dtype)

    def check_positions(self, shape: tuple[int, ...]) -> None:
        """Raise InvalidInputError unless positions are [L], or [L, F] with one for each frequency."""
        count = len(self.inv_freq)
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != count):
            raise InvalidInputError(
                f"positions must be [L], or [L, {count}] with one for each of the {count} rotary frequencies (not for "
                f"heads), got shape {tuple(shape)}."
            )

    def check_width(self, head_dim: int) -> None:
        """Raise InvalidInputError where a head of ``head_dim`` channels lacks some that are rotated."""
        start, stop = self.rotated
        if stop > head_dim:
            raise InvalidInputError(
                f"Rotary rotates channels {start}..{stop - 1}, but the head has {head_dim} channels."
            )

    def rotate(self, x_BHLD: Tensor, cos_LF: Tensor, sin_LF: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rotate in the precision of the tables.

        Parameters
        ----------
        x_BHLD : Tensor
            Queries or keys.
        cos_LF, sin_LF : Tensor
            From :meth:`tables`; ``cos`` may also have one entry per channel (:meth:`both`).
        out : Tensor, optional
            Memory of the shape of ``x`` that may be used for the result: fresh pages cost more than the arithmetic.

        Returns
        -------
        Tensor
            [B, H, L, D] in the dtype of ``x``.
        """
        start, stop = self.rotated
        if stop > x_BHLD.shape[-1]:
            self.check_width(x_BHLD.shape[-1])
        whole = (start, stop) == (0, x_BHLD.shape[-1])
        part = (x_BHLD if whole else x_BHLD[..., start:stop]).to(cos_LF.dtype)
        first, second = self._pair(part)
        both = cos_LF if cos_LF.shape[-1] == stop - start else self.both(cos_LF)
        usable = whole and out is not None and out.dtype == part.dtype
        rotated = torch.mul(part, both, out=out) if usable else part * both
        rotated_first, rotated_second = self._pair(rotated)
        rotated_first.addcmul_(second, sin_LF, value=-1)
        rotated_second.addcmul_(first, sin_LF)
        rotated = rotated.to(x_BHLD.dtype)
        return rotated if whole else torch.cat((x_BHLD[..., :start], rotated, x_BHLD[..., stop:]), dim=-1)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two channels of every pair, as views."""
        if self.style == "interleaved":
            return x[..., 0::2], x[..., 1::2]
        half = len(self.inv_freq)
        return x.narrow(-1, 0, half), x.narrow(-1, half, half)

    def both(self, table: Tensor) -> Tensor:
        """A table of one entry per pair, [..., F], with one entry per channel, [..., 2F]."""
        if self.style == "interleaved":
            return table.repeat_interleave(2, -1)
        return torch.cat((table, table), -1)

    def rotate_as_stock(self, x_BHLD: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Rotate with the same operations as transformers' own modules, so that identity plans are bit-equal."""
        angle_BLF = position_ids_BL[..., None].float() * self.inv_freq.to(device=x_BHLD.device, dtype=torch.float)
        start, stop = self.rotated
        part = x_BHLD[..., start:stop]
        if self.arithmetic == "complex":
            rotated = self._complex_product(part, angle_BLF)
        else:
            cos, sin = angle_BLF.cos() * self.attention_scaling, angle_BLF.sin() * self.attention_scaling
            rotated = self._real_product(part, cos[:, None], sin[:, None])
        if (start, stop) == (0, x_BHLD.shape[-1]):
            return rotated
        return torch.cat((x_BHLD[..., :start], rotated, x_BHLD[..., stop:]), dim=-1)

    def _real_product(self, part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dtype = part.dtype
        if self.arithmetic in ("native", "mixed"):
            cos, sin = cos.to(dtype), sin.to(dtype)
        if self.arithmetic == "mixed":
            part = part.float()
        first, second = self._pair(part)
        if self.style == "half":
            swapped = torch.cat((-second, first), dim=-1)
        else:
            swapped = torch.stack((-second, first), dim=-1).flatten(-2)
        return ((part * self.both(cos)) + (swapped * self.both(sin))).to(dtype)

    def _complex_product(self, part: Tensor, angle_BLF: Tensor) -> Tensor:
        factor = (torch.polar(torch.ones_like(angle_BLF), angle_BLF) * self.attention_scaling)[:, None]
        if self.style == "interleaved":
            product = torch.view_as_complex(part.float().reshape(*part.shape[:-1], -1, 2)) * factor
            return torch.view_as_real(product).flatten(-2).to(part.dtype)
        first, second = part.float().chunk(2, dim=-1)
        product = torch.complex(first, second) * factor
        return torch.cat((product.real, product.imag), dim=-1).to(part.dtype)


def same_frequencies(one: Rotary, other: Rotary) -> bool:
    """True when two rotaries have the same frequencies and the same factor, bit for bit."""
    return one.attention_scaling == other.attention_scaling and torch.equal(one.inv_freq, other.inv_freq)


def fault_of(answer: Any, base: Rotary, *, changes: bool) -> str | None:
    """What is wrong with the rotary that a strategy made of ``base``, or None.

    Parameters
    ----------
    answer : Rotary
        What ``rotary(base, prompt)`` returned.
    base : Rotary
        The model's own.
    changes : bool
        Whether the strategy declares that it changes frequencies.
    """
    if not isinstance(answer, Rotary):
        return f"returns {answer!r:.100}, not a Rotary."
    layouts = [(one.style, one.rotated, one.arithmetic, len(one.inv_freq)) for one in (answer, base)]
    if layouts[0] != layouts[1]:
        return "changes the layout of the rotation: use base.with_frequencies(...)."
    finite = answer.inv_freq.is_floating_point() and bool(answer.inv_freq.isfinite().all())
    if not (finite and 0 < answer.attention_scaling < math.inf):
        return "has a frequency or an attention_scaling that is not finite and positive."
    if not changes and not same_frequencies(answer, base):
        return "returns other frequencies, but Capabilities(changes_frequencies=True) is not declared."
    return None
