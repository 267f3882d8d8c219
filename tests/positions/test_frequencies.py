"""Frequency strategies equal transformers' own values bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import posenc
from posenc import Rotary
from posenc.planning.composed import ComposedStrategy

WINDOW, THETA, DIM = 512, 10000.0, 32
RAMP = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DIVISORS = {
    "short_factor": [1 + c / 10 for c in range(DIM // 2)],
    "long_factor": [2 + c for c in range(DIM // 2)],
}


def stock(rope_type: str, *, theta: float, dim: int, length: int, **values: Any) -> tuple[torch.Tensor, float]:
    """The frequencies and the factor that transformers computes for a real model configuration."""
    parameters = {"rope_type": rope_type, "rope_theta": theta, **values}
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = WINDOW
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=WINDOW, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 2.0}),
    ("linear", {"factor": 7.5}),
    ("dynamic", {"factor": 1.0}),
    ("dynamic", {"factor": 4.0}),
    ("yarn", {"factor": 4.0}),
    ("yarn", {"factor": 1.0}),
    ("yarn", {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5}),
    ("llama3", {"factor": 8.0, **RAMP}),
    ("longrope", {"factor": 4.0, **DIVISORS}),
]


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("dim", [32, 64, 8])
@pytest.mark.parametrize("prompt", [100, 512, 513, 3000])
def test_frequencies_equal_those_of_transformers_bit_for_bit(
    name: str, params: dict[str, Any], theta: float, dim: int, prompt: int
) -> None:
    if name == "longrope" and dim != DIM:
        params = {**params, **{key: values[:1] * (dim // 2) for key, values in DIVISORS.items()}}
    base = Rotary.from_theta(theta, dim, style="interleaved", channels=(8, 8 + dim))
    rotary = posenc.strategy(name, window=WINDOW, **params).rotary(base, prompt)
    inv_freq, scaling = stock(name, theta=theta, dim=dim, length=prompt, **params)
    assert rotary.inv_freq.dtype == inv_freq.dtype
    if name == "yarn" and params["factor"] == 1:  # transformers rounds when it mixes a frequency with itself
        assert torch.allclose(rotary.inv_freq, inv_freq, rtol=1e-6, atol=0)
        inv_freq = base.inv_freq
    assert torch.equal(rotary.inv_freq, inv_freq)
    assert rotary.attention_scaling == scaling
    assert (rotary.style, rotary.channels, rotary.theta) == (base.style, base.channels, base.theta)


def test_frequencies_have_known_values() -> None:
    base = Rotary.from_theta(THETA, DIM)
    inverse = base.inv_freq

    def rotary(name: str, prompt: int = 2048, **params: Any) -> Rotary:
        return posenc.strategy(name, window=WINDOW, **params).rotary(base, prompt)

    assert torch.equal(rotary("linear", factor=4).inv_freq, inverse / 4)
    ntk = rotary("ntk", factor=4)
    expected = Rotary.from_theta(THETA * 4 ** (DIM / (DIM - 2)), DIM)
    assert torch.equal(ntk.inv_freq, expected.inv_freq)
    assert ntk.inv_freq[0] == 1
    assert float(inverse[-1] / ntk.inv_freq[-1]) == pytest.approx(4, rel=1e-5)
    assert torch.equal(rotary("dynamic", prompt=WINDOW).inv_freq, inverse)
    assert torch.allclose(rotary("dynamic", prompt=4 * WINDOW).inv_freq, ntk.inv_freq, rtol=1e-6)
    yarn = rotary("yarn", factor=4)
    assert yarn.attention_scaling == 0.1 * math.log(4) + 1
    assert yarn.inv_freq[0] == inverse[0]
    assert float(inverse[-1] / yarn.inv_freq[-1]) == pytest.approx(4, rel=1e-6)
    longrope = rotary("longrope", factor=4, long_factor=[4])
    assert torch.allclose(longrope.inv_freq, inverse / 4, rtol=1e-6)
    assert longrope.attention_scaling == math.sqrt(1 + math.log(4) / math.log(WINDOW))
    assert torch.equal(rotary("longrope", prompt=WINDOW, long_factor=[4]).inv_freq, inverse)


@pytest.mark.parametrize("name", ["linear", "dynamic", "ntk", "yarn", "llama3", "longrope"])
def test_theta_is_recovered_from_geometric_frequencies(name: str) -> None:
    strategy = posenc.strategy(name, window=WINDOW)
    for theta in (10000.0, 500000.0):
        base = Rotary.from_theta(theta, DIM)
        derived = strategy.rotary(Rotary(base.inv_freq), 2048)
        assert torch.equal(derived.inv_freq, strategy.rotary(base, 2048).inv_freq)
    odd = Rotary.from_theta(1234.567, DIM).inv_freq
    expected = strategy.rotary(Rotary.from_theta(1234.567, DIM), 2048).inv_freq
    assert torch.allclose(strategy.rotary(Rotary(odd), 2048).inv_freq, expected, rtol=1e-5)


BENT = Rotary.from_theta(THETA, DIM).inv_freq * torch.linspace(1, 0.3, DIM // 2)


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_frequencies_that_are_not_geometric_are_refused(name: str) -> None:
    strategy = posenc.strategy(name, window=WINDOW)
    for inv_freq in (BENT, torch.zeros(4), Rotary.from_theta(THETA, DIM).inv_freq / 2):
        for theta in (None, THETA):
            with pytest.raises(posenc.InvalidConfigError, match=rf"^frequencies\.{name}: .*theta"):
                strategy.rotary(Rotary(inv_freq, theta=theta), 2048)


@pytest.mark.parametrize("theta", [None, THETA])
def test_other_formulas_change_the_existing_frequencies(theta: float | None) -> None:
    base = Rotary(BENT, 1.25, theta=theta)
    shares = torch.arange(DIM // 2) / (DIM // 2 - 1)
    for name, params, expected in (
        ("linear", {"factor": 3.0}, BENT / 3),
        ("ntk", {"factor": 3.0}, BENT / 3**shares),
        ("dynamic", {"factor": 2.0}, BENT / 7**shares),  # 2 * 2048 / 512 - 1
    ):
        rotary = posenc.strategy(name, window=WINDOW, **params).rotary(base, 2048)
        assert torch.allclose(rotary.inv_freq, expected, rtol=1e-6, atol=0), name
        assert rotary.attention_scaling == 1.25
    rotary = posenc.strategy("llama3", window=WINDOW, factor=3.0).rotary(base, 2048)
    turns = BENT * WINDOW / (2 * math.pi)
    share = ((turns - 1) / 3).clip(0, 1)
    assert torch.allclose(rotary.inv_freq, BENT * (share + (1 - share) / 3), rtol=1e-6, atol=0)
    assert rotary.attention_scaling == 1.25


@pytest.mark.parametrize("name", ["linear", "dynamic", "ntk", "yarn", "llama3", "longrope"])
def test_rounded_frequencies_stay_rounded(name: str) -> None:
    """A model that was cast to bfloat16 has rounded frequencies, and it is these that are scaled."""
    plain = Rotary.from_theta(THETA, DIM)
    rounded = Rotary(plain.inv_freq.bfloat16(), theta=THETA)
    strategy = posenc.strategy(name, window=WINDOW, factor=4.0)
    change = strategy.rotary(plain, 2048).inv_freq / plain.inv_freq
    inv_freq = strategy.rotary(rounded, 2048).inv_freq
    if name != "llama3":  # its bands depend on the frequencies themselves
        assert torch.allclose(inv_freq, rounded.inv_freq.float() * change, rtol=1e-6, atol=0)
    assert not torch.equal(inv_freq, strategy.rotary(plain, 2048).inv_freq)


@pytest.mark.parametrize("name", ["linear", "dynamic", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize(
    "base",
    [
        Rotary.from_theta(THETA, 128),
        Rotary(BENT, 1.25, theta=THETA, scaling="llama3"),
        Rotary(torch.tensor([1.0, 0.1, 0.0]), 0.5, scaling="proportional"),
        Rotary(Rotary.from_theta(5e5, 64).inv_freq.bfloat16(), theta=5e5),
    ],
)
def test_a_factor_of_one_changes_no_bit(name: str, base: Rotary) -> None:
    rotary = posenc.strategy(name, window=WINDOW, factor=1.0).rotary(base, WINDOW)
    assert torch.equal(rotary.inv_freq, base.inv_freq)
    assert rotary.attention_scaling == base.attention_scaling


def test_a_scaling_that_cannot_be_replaced_is_refused() -> None:
    for base, why in (
        (Rotary(BENT, theta=THETA, scaling="proportional"), "more than a scaling"),
        (Rotary(BENT, scaling="llama3"), "its theta is not known"),
    ):
        with pytest.raises(posenc.InvalidConfigError, match=rf"^linear\.replace: .*{base.scaling}.*{why}"):
            posenc.strategy("linear", replace=True).rotary(base, 2048)


@pytest.mark.parametrize("name", ["dynamic", "yarn", "llama3", "longrope"])
def test_a_missing_window_is_an_error(name: str) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=rf"^{name}\.window: .*Pass window="):
        posenc.strategy(name).rotary(Rotary.from_theta(THETA, DIM), 2048)


@pytest.mark.parametrize("name", ["ntk", "dynamic"])
def test_a_single_frequency_is_refused(name: str) -> None:
    with pytest.raises(posenc.InvalidConfigError, match="at least two rotary frequencies"):
        posenc.strategy(name, window=WINDOW).rotary(Rotary.from_theta(THETA, 2), 2048)


def test_lists_of_another_length_than_the_models_frequencies_are_refused() -> None:
    base = Rotary.from_theta(THETA, DIM)
    with pytest.raises(posenc.InvalidConfigError, match=r"^longrope\.long_factor: 3 divisors.*16 rotary frequencies"):
        posenc.strategy("longrope", window=WINDOW, long_factor=[1, 2, 3]).rotary(base, 2048)
    with pytest.raises(posenc.InvalidConfigError, match=r"^longrope\.window: .* window of 1 token"):
        posenc.strategy("longrope", window=1).rotary(base, 2048)
    assert posenc.strategy("longrope", window=1, attention_factor=1.5).rotary(base, 2048).attention_scaling == 1.5
    with pytest.raises(posenc.InvalidConfigError, match=r"^dpe\.scales: 3 scales.*16 rotary frequencies"):
        posenc.strategy("dpe", window=WINDOW, scales=[1, 2, 3]).rotary(base, 2048)
    both = ComposedStrategy(
        posenc.strategy("dpe", window=WINDOW, scales=[1, 2, 3]), posenc.strategy("yarn", window=WINDOW)
    )
    with pytest.raises(posenc.InvalidConfigError, match=r"^dpe\.scales: "):
        both.rotary(base, 2048)
    for scales in ([4], [2] * 16):
        dpe = posenc.strategy("dpe", window=WINDOW, scales=scales)
        assert dpe.rotary(base, 2048) is base
        cos, _ = base.tables(dpe.plan(100).segments[-1].query_positions)
        assert cos.shape == (100, 16)


def test_the_built_in_strategies_plan_without_torch() -> None:
    code = (
        "import sys, posenc_plugins; from posenc.planning.composed import ComposedStrategy; "
        "required = {'auto': {'calibration': {'ranges': [{'up_to': 9, 'pick': {'strategy': 'dca', 'because': ''}}]}}}; "
        "[s(window=512, **required.get(s.name, {})).plan(2000) for s in posenc_plugins.STRATEGIES]; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
