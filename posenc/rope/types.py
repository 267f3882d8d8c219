"""Frequencies of the rope types that checkpoints declare, computed as transformers computes them, bit for bit.

The tests compare every type with the installed transformers.

Shape letter: F rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ORIGINAL = "original_max_position_embeddings"
"""The key of the window that scaling starts from."""

Frequencies = tuple[Tensor, float]
"""``inv_freq``, float32 [F], and the factor on cos and sin."""


def frequencies_of(
    kind: str, parameters: Mapping[str, Any], *, dim: int, longest: int | None = None, prompt: int | None = None
) -> Frequencies:
    """The frequencies of a rope type.

    Parameters
    ----------
    kind : str
        One of :data:`ROPE_TYPES`.
    parameters : mapping
        ``rope_parameters`` of a configuration: ``rope_theta``, and what the type needs.
    dim : int
        Rotated channels of a head; for ``proportional`` all of its channels.
    longest : int, optional
        ``max_position_embeddings``, for types that derive a factor from it.
    prompt : int, optional
        Prompt length in tokens, for the types that depend on it; by default inside the window.

    Returns
    -------
    tuple
        ``inv_freq``, float32 [F], and the factor on cos and sin.

    Raises
    ------
    KeyError, TypeError, ValueError
        If a parameter that the type needs is missing or of the wrong kind.
    """
    return ROPE_TYPES[kind](parameters, dim, longest, prompt)


def geometric(theta: float, dim: int, *, over: int | None = None) -> Tensor:
    """``theta ** (-2 c / over)`` for the pairs ``c`` of ``dim`` channels, float32; ``over`` is ``dim`` by default."""
    exponents_F = torch.arange(0, dim, 2, dtype=torch.int64).float() / (over or dim)
    return 1.0 / theta**exponents_F


def llama3_bands(inv_freq_F: Tensor, *, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1 (arXiv 2407.21783): divide long wavelengths by ``factor``, keep short ones, blend in between.

    Parameters
    ----------
    inv_freq_F : float32 [F]
        Frequencies before scaling.
    factor : float
        Divisor of the long wavelengths.
    low, high : float
        A wavelength is long above ``original / low`` tokens and short below ``original / high``.
    original : float
        The window that scaling starts from, in tokens.
    """
    wavelength_F = 2 * math.pi / inv_freq_F
    long_F = wavelength_F > original / low
    between_F = ~(wavelength_F < original / high) & ~long_F
    share_F = (original / wavelength_F - low) / (high - low)
    blended_F = (1 - share_F) * inv_freq_F / factor + share_F * inv_freq_F
    return torch.where(between_F, blended_F, torch.where(long_F, inv_freq_F / factor, inv_freq_F))


def _default(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    return geometric(parameters["rope_theta"], dim), 1.0


def _linear(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    """Position interpolation (arXiv 2306.15595)."""
    return geometric(parameters["rope_theta"], dim) / parameters["factor"], 1.0


def _proportional(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    """Gemma 4: the first share of the head rotates; all other frequencies are zero."""
    share = parameters.get("partial_rotary_factor", 1.0)
    rotating = int(share * dim // 2)
    inv_freq_F = torch.zeros(dim // 2)
    inv_freq_F[:rotating] = geometric(parameters["rope_theta"], 2 * rotating, over=dim)
    return inv_freq_F / parameters.get("factor", 1.0), 1.0


def _dynamic(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    """Dynamic NTK: the base grows with the length beyond the window."""
    window, factor = _declared(longest), parameters["factor"]
    length = max(prompt or window, window)
    growth = (factor * length / window - (factor - 1)) ** (dim / (dim - 2))
    return geometric(parameters["rope_theta"] * growth, dim), 1.0


def _yarn(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    """YaRN (arXiv 2309.00071, section 3): interpolate slow frequencies, keep fast ones, blend in between."""
    theta, original, factor = parameters["rope_theta"], parameters[ORIGINAL], parameters["factor"]
    if factor is None:
        factor = _declared(longest) / original

    def pair_of(turns: float) -> float:
        """The (fractional) pair of channels that makes so many turns within the original window."""
        return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    first = pair_of(parameters.get("beta_fast") or 32)
    last = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001  # a step where both ends meet
    ramp_F = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - first) / width, 0, 1)
    kept_F = 1 - ramp_F
    powers_F = theta ** (torch.arange(0, dim, 2).float() / dim)
    inv_freq_F = 1.0 / (factor * powers_F) * (1 - kept_F) + 1.0 / powers_F * kept_F
    return inv_freq_F, _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    declared = parameters.get("attention_factor")
    if declared is not None:
        return float(declared)
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1)


def _longrope(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    """LongRoPE (arXiv 2402.13753): a divisor for every frequency, one set inside the window and one beyond."""
    original, factor, declared = parameters[ORIGINAL], parameters.get("factor"), parameters.get("attention_factor")
    inside, beyond = parameters["short_factor"], parameters["long_factor"]
    if factor is None:
        factor = _declared(longest) / original
    if declared is None:
        declared = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    divisors_F = torch.tensor(beyond if prompt and prompt > original else inside, dtype=torch.float32)
    exponents_F = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (divisors_F * parameters["rope_theta"] ** exponents_F), float(declared)


def _llama3(parameters: Mapping[str, Any], dim: int, longest: int | None, prompt: int | None) -> Frequencies:
    scaled_F = llama3_bands(
        geometric(parameters["rope_theta"], dim),
        factor=parameters["factor"],
        low=parameters["low_freq_factor"],
        high=parameters["high_freq_factor"],
        original=parameters[ORIGINAL],
    )
    return scaled_F, 1.0


def _declared(longest: int | None) -> int:
    if longest is None:
        raise ValueError("max_position_embeddings is not declared")
    return longest


ROPE_TYPES: dict[str, Callable[[Mapping[str, Any], int, int | None, int | None], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
"""A function for every rope type that posenc knows, by transformers' name of the type."""
