"""Bases of the frequency strategies, which scale the frequencies that the model has.

A checkpoint may declare rope scaling of its own (llama3, yarn, linear, longrope, ...). A formula that multiplies
frequencies is applied to those of the checkpoint. One that needs the unscaled ones refuses such a checkpoint, unless
``replace=True`` drops the checkpoint's scaling. Torch is imported only when frequencies are computed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.errors import InvalidConfigError
from posenc.params import Params
from posenc.positions import FrequencyStrategy

if TYPE_CHECKING:
    from posenc.rope import Rotary

PLAIN = "default"
LENGTH_SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")
"""The rope types that start from ``theta ** (-2 c / dim)``, so that the unscaled frequencies are known."""

Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FrequencyParams(Params):
    """Parameters that every built-in frequency strategy takes."""

    replace: bool = Field(
        False, description="drop the rope scaling that the checkpoint declares and start from the unscaled frequencies"
    )


class ScaledFrequencies(FrequencyStrategy):
    """Base of the built-in frequency strategies: :meth:`scaled` changes the model's frequencies.

    With ``replace=True`` it gets the unscaled frequencies of a checkpoint that declares rope scaling.
    """

    Params = FrequencyParams

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        """Frequencies for a prompt of ``prompt`` tokens.

        Raises
        ------
        InvalidConfigError
            If the strategy cannot start from the model's frequencies, or needs a pretraining window that is not known.
        """
        return self.scaled(self._starting_point(base), prompt)

    @abstractmethod
    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        """The scaled frequencies, from those to start with."""

    @property
    def known_window(self) -> int:
        """The pretraining window; raises InvalidConfigError if it is not known."""
        if self.window is None:
            raise InvalidConfigError(
                f"{self.name}.window: the frequencies depend on the pretraining window, which is not known here. "
                "Pass window=... (in tokens)."
            )
        return self.window

    def _starting_point(self, base: Rotary) -> Rotary:
        from dataclasses import replace

        from posenc.rope import Rotary

        if not self.params.replace or base.scaling == PLAIN:
            return base
        if base.scaling not in LENGTH_SCALINGS or base.theta is None:
            reason = "its theta is not known" if base.theta is None else "it is more than a scaling"
            raise InvalidConfigError(
                f"{self.name}.replace: the checkpoint's own rope type {base.scaling!r} cannot be dropped ({reason}). "
                "Leave replace out."
            )
        plain = Rotary.from_theta(base.theta, 2 * len(base.inv_freq)).inv_freq
        return replace(base, inv_freq=plain.to(base.inv_freq.device), attention_scaling=1.0, scaling=PLAIN)

    def rebased(self, base: Rotary, growth: float) -> Rotary:
        """Frequencies of the base ``theta growth^(D / (D - 2))``; ``growth`` 1 returns ``base`` itself.

        Frequencies that are not ``theta ** (-2 c / D)`` get the same change, ``inv_freq_c growth^(-2 c / (D - 2))``.

        Raises
        ------
        InvalidConfigError
            If there is one frequency only.
        """
        import torch

        from posenc.rope import Rotary

        count = len(base.inv_freq)
        if count < 2:
            raise InvalidConfigError(
                f"frequencies.{self.name}: needs at least two rotary frequencies, the model has one."
            )
        if growth == 1:
            return base
        theta = exact_theta(base)
        if theta is not None:
            inv_freq = Rotary.from_theta(theta * growth ** (count / (count - 1)), 2 * count).inv_freq
            return base.with_frequencies(inv_freq.to(base.inv_freq.device), base.attention_scaling)
        exponents = torch.arange(count, dtype=torch.float64, device=base.inv_freq.device) / (count - 1)
        return base.with_frequencies((base.inv_freq.double() * growth**-exponents).float(), base.attention_scaling)

    def scaled_by_type(self, base: Rotary, prompt: int, **values: Any) -> Rotary:
        """The scaling of the rope type ``self.name`` on frequencies that are not scaled yet.

        Parameters
        ----------
        base : Rotary
            Frequencies and layout to start from. If they are exactly ``theta ** (-2 c / dim)``, the result is bit-equal
            to that of transformers. If they were rounded, they are multiplied by the change that transformers makes.
        prompt : int
            Prompt length in tokens, for the types that depend on it.
        **values
            Further keys of ``rope_parameters``; those that are None are left out.

        Raises
        ------
        InvalidConfigError
            If the frequencies are scaled already, or the window or the base of the frequencies is unknown.
        """
        from posenc.rope import Rotary
        from posenc.rope.types import ORIGINAL, frequencies_of

        if base.scaling != PLAIN:
            raise InvalidConfigError(
                f"frequencies.{self.name}: the checkpoint declares rope scaling of its own ({base.scaling!r}), and the "
                f"formula of {self.name!r} starts from unscaled frequencies. Choose 'linear', 'ntk', 'dynamic' "
                f"or 'llama3', which change the frequencies that the checkpoint has, or pass replace=True to replace "
                f"{base.scaling!r} by {self.name!r}."
            )
        theta, count = _theta(base, name=self.name), len(base.inv_freq)
        plain, window = Rotary.from_theta(theta, 2 * count).inv_freq, self.known_window
        rope_parameters = {key: value for key, value in values.items() if value is not None}
        rope_parameters |= {"rope_theta": theta, ORIGINAL: window}
        inv_freq, attention_factor = frequencies_of(
            self.name, rope_parameters, dim=2 * count, longest=window, prompt=prompt
        )
        if not _same_bits(base, plain):
            inv_freq = base.inv_freq.float() * (inv_freq / plain).to(base.inv_freq.device)
        return base.with_frequencies(inv_freq.to(base.inv_freq.device), base.attention_scaling * attention_factor)


class FactorScaling(ScaledFrequencies):
    """A scaling by one ``factor``, which ``posenc calibrate`` chooses."""

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)


def exact_theta(base: Rotary) -> float | None:
    """The theta for which the frequencies are bit-equal to ``theta ** (-2 c / dim)``, or None."""
    from posenc.rope import Rotary

    estimate = _theta_of_last(base)
    for theta in (base.theta, None if estimate is None else float(round(estimate)), estimate):
        if theta and _same_bits(base, Rotary.from_theta(theta, 2 * len(base.inv_freq)).inv_freq):
            return theta
    return None


def _theta(base: Rotary, *, name: str) -> float:
    """The theta for which the frequencies are ``theta ** (-2 c / dim)`` up to rounding; raises InvalidConfigError."""
    import torch

    from posenc.rope import Rotary

    exact = exact_theta(base)
    if exact is not None:
        return exact
    inv_freq = base.inv_freq.detach().float().cpu()
    rounding = max(1e-5, torch.finfo(base.inv_freq.dtype).eps)
    for theta in (base.theta, _theta_of_last(base)):
        if theta and torch.allclose(Rotary.from_theta(theta, 2 * len(inv_freq)).inv_freq, inv_freq, rounding, 0):
            return theta
    raise InvalidConfigError(
        f"frequencies.{name}: the model's frequencies are not theta ** (-2 c / dim) of a known theta, "
        f"so {name!r} cannot be computed. Pass Rotary(..., theta=...) or choose another frequency strategy."
    )


def _theta_of_last(base: Rotary) -> float | None:
    """The theta that the lowest frequency implies."""
    count = len(base.inv_freq)
    last = float(base.inv_freq[-1])
    return last ** (-count / (count - 1)) if count > 1 and last > 0 else None


def _same_bits(base: Rotary, inv_freq: Any) -> bool:
    import torch

    left = base.inv_freq.detach()
    return left.dtype == inv_freq.dtype and torch.equal(left.cpu(), inv_freq)
