"""NTK-aware scaling: bloc97 2023; written down as section 3.1 of Peng et al. 2023 (YaRN), arXiv 2309.00071."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibrate.grid import factor_grid
from posenc.errors import InvalidConfigError
from posenc.positions import FrequencyStrategy, Params
from posenc_plugins.transformers_rope import geometric_theta

if TYPE_CHECKING:
    from posenc.rope import Rotary


class NTKParams(Params):
    """Parameters of :class:`NTKScaling`."""

    factor: float = Field(4.0, ge=1, allow_inf_nan=False, description="f, the lowest frequency is divided by it")


class NTKScaling(FrequencyStrategy):
    """The base of the frequencies becomes ``theta f^(D / (D - 2))`` (definition 1)."""

    name = "ntk"
    summary = "NTK-aware scaling: a larger, fixed base"
    paper = "bloc97 2023, NTK-aware scaled RoPE, in Peng et al. 2023, arXiv 2309.00071"
    Params = NTKParams

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        from posenc.rope import Rotary

        dim = 2 * len(base.inv_freq)
        if dim < 4:
            raise InvalidConfigError("frequencies.ntk: needs at least two rotary frequencies, the model has one.")
        theta = geometric_theta(base, name=self.name) * self.params.factor ** (dim / (dim - 2))
        inv_freq = Rotary.from_theta(theta, dim).inv_freq
        return base.with_frequencies(inv_freq.to(base.inv_freq.device), 1.0)
