"""transformers' own frequency functions, called on a posenc Rotary. Imports torch only when used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from posenc.errors import InvalidConfigError

if TYPE_CHECKING:
    from posenc.positions import PositionStrategy
    from posenc.rope import Rotary


def geometric_theta(base: Rotary, *, name: str) -> float:
    """The base of the frequencies: ``base.theta``, else read off frequencies that are geometric.

    Raises
    ------
    InvalidConfigError
        If it is unknown and the frequencies are not ``theta ** (-2 c / dim)``.
    """
    import torch

    from posenc.rope import Rotary

    if base.theta is not None:
        return base.theta
    inv_freq = base.inv_freq.detach().float().cpu()
    count = len(inv_freq)
    if count > 1 and float(inv_freq[-1]) > 0:
        theta = float(inv_freq[-1].double() ** (-count / (count - 1)))
        plain = Rotary.from_theta(round(theta), 2 * count).inv_freq
        if torch.equal(plain, inv_freq):
            return float(round(theta))
        if torch.allclose(Rotary.from_theta(theta, 2 * count).inv_freq, inv_freq, rtol=1e-5, atol=0):
            return theta
    raise InvalidConfigError(
        f"frequencies.{name}: the model's frequencies are not theta ** (-2 c / dim), and no theta is known, "
        f"so {name!r} cannot be computed. Pass Rotary(..., theta=...) or drop the frequency strategy."
    )


def transformers_rotary(
    strategy: PositionStrategy, base: Rotary, prompt: int, *, needs_window: bool = True, **values: Any
) -> Rotary:
    """``ROPE_INIT_FUNCTIONS[strategy.name]`` of transformers for the layout of ``base``.

    Parameters
    ----------
    strategy : PositionStrategy
        Its name is transformers' ``rope_type``, its window the pretraining window.
    base : Rotary
        The model's own frequencies and layout.
    prompt : int
        Prompt length in tokens, for the types that depend on it.
    **values
        Further keys of ``rope_parameters``; those that are None are left out.

    Raises
    ------
    InvalidConfigError
        If the window or the base of the frequencies is needed and unknown.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name, window = strategy.name, strategy.window
    if window is None and needs_window:
        raise InvalidConfigError(
            f"{name}.window: the frequencies depend on the pretraining window, which is not known here. "
            "Pass window=... (in tokens)."
        )
    dim = 2 * len(base.inv_freq)
    given = {key: value for key, value in values.items() if value is not None}
    config = SimpleNamespace(
        rope_parameters={
            "rope_type": name,
            "rope_theta": geometric_theta(base, name=name),
            "original_max_position_embeddings": window,
            **given,
        },
        max_position_embeddings=window,
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        standardize_rope_params=lambda: None,  # already in today's form
    )
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[name](config, device=None, seq_len=prompt)
    return base.with_frequencies(inv_freq.to(base.inv_freq.device), float(attention_scaling))
