"""Checks of ``strategy.rotary``."""

from __future__ import annotations

from dataclasses import replace

import torch

from posenc.errors import InvalidConfigError, PosencError
from posenc.positions import PositionStrategy
from posenc.rope import Rotary, fault_of, same_frequencies
from posenc.testing.violation import violated


def check_rotary(strategy: PositionStrategy) -> None:
    """Frequencies, their factor and their dependence on the length are as declared; the layout stays the model's."""
    able, count = strategy.capabilities, _frequencies(strategy)
    window = strategy.window or 512
    base = Rotary.from_theta(1e4, 2 * count, style="interleaved", channels=(8, 8 + 2 * count))
    before = base.inv_freq.clone()
    prompts = (1, window // 5 or 1, window, window + 1, 6 * window, 60 * window)
    by_prompt = {prompt: _rotary(strategy, base, prompt) for prompt in prompts}
    if not torch.equal(before, base.inv_freq):
        violated(f"{strategy!r}.rotary() writes into the frequencies it is given.")
    for prompt, rotary in by_prompt.items():
        where = f"{strategy!r}.rotary(base, {prompt})"
        fault = fault_of(rotary, base, changes=able.changes_frequencies)
        if fault is not None:
            violated(f"{where} {fault}")
        if not (able.frequencies_by_length or same_frequencies(rotary, by_prompt[1])):
            violated(
                f"{where} and rotary(base, 1) differ, but Capabilities(frequencies_by_length=True) is not declared."
            )
        if not same_frequencies(rotary, _rotary(strategy, base, prompt)):
            violated(f"{where} differs when it is called again.")
    if able.changes_frequencies and all(same_frequencies(rotary, base) for rotary in by_prompt.values()):
        violated(f"{strategy!r} declares changes_frequencies, but rotary() returns the model's own at every length.")
    if able.frequencies_by_length and all(same_frequencies(rotary, by_prompt[1]) for rotary in by_prompt.values()):
        violated(f"{strategy!r} declares frequencies_by_length, but rotary() is the same at every length.")
    if able.changes_frequencies and not getattr(strategy.params, "replace", False):
        _check_start(strategy, base, by_prompt[6 * window])


def _check_start(strategy: PositionStrategy, base: Rotary, usual: Rotary) -> None:
    """The rope scaling of a checkpoint must be kept, or the checkpoint refused."""
    prompt = 6 * (strategy.window or 512)
    factors = torch.linspace(1, 0.25, len(base.inv_freq))
    scaled = replace(base, inv_freq=base.inv_freq * factors, attention_scaling=1.25, scaling="llama3")
    try:
        rotary = strategy.rotary(scaled, prompt)
    except InvalidConfigError:
        return
    if torch.equal(rotary.inv_freq, usual.inv_freq) or rotary.attention_scaling == usual.attention_scaling:
        violated(
            f"{strategy!r}.rotary(base, {prompt}) drops the model's own scaling (base.inv_freq, "
            "base.attention_scaling). Start from both, or raise InvalidConfigError unless base.scaling is 'default'."
        )


def _frequencies(strategy: PositionStrategy) -> int:
    """How many frequencies to test with: the number of columns of the plan's positions, else 16."""
    arrays = (a for s in strategy.plan(200).segments for a in (s.query_positions, s.key_positions))
    return max((a.shape[1] for a in arrays if a.ndim == 2 and a.shape[1] > 1), default=16)


def _rotary(strategy: PositionStrategy, base: Rotary, prompt: int) -> Rotary:
    try:
        return strategy.rotary(base, prompt)
    except PosencError as error:
        violated(f"{strategy!r}.rotary(base, {prompt}) raises {type(error).__name__}: {error}")
