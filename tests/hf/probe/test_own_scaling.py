"""Frequency strategies on checkpoints that declare rope scaling start from the model's own frequencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import posenc
from posenc import Rotary
from posenc.evaluate.models import Loaded
from posenc.hf.apply import find_adapter
from posenc.hf.fingerprint import fingerprint
from tests.hf import tiny

FACTORS = ("linear", "ntk", "dynamic", "yarn", "llama3")
IDS = tiny.tokens(1, 40)
ROPE: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.5] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"factor": 2.0},
}


def llama(rope_type: str) -> Any:
    torch.manual_seed(0)
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type]}
    return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, rope_parameters=parameters)).eval()


def gemma() -> Any:
    """Return a model with the rotary parameters of Gemma 3 from 4B up, which differ by layer type."""
    torch.manual_seed(0)
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = Gemma3TextConfig(
        **tiny.SHAPE,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope,
    )
    return Gemma3ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {**{name: lambda name=name: llama(name) for name in ROPE}, "gemma3": gemma}


def logits(model: Any, length: int = IDS.shape[1]) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:, :length]).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_factor_of_one_changes_no_bit(name: str) -> None:
    model = MODELS[name]()
    stock = logits(model)
    for strategy in FACTORS:
        with posenc.apply(model, strategy, factor=1.0, window=tiny.WINDOW):
            assert torch.equal(logits(model), stock), strategy
    with posenc.apply(model, "rerope", window_size=50, frequencies={"name": "ntk", "factor": 1.0}):
        assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("name", ROPE)
def test_linear_divides_the_frequencies_of_the_checkpoint(name: str) -> None:
    """The reference is the model itself with its own buffer divided."""
    model = llama(name)
    with posenc.apply(model, "linear", factor=2.0):
        got = logits(model, 30)
    module = model.model.rotary_emb
    buffers = (module.inv_freq, module.original_inv_freq)
    for inv_freq in {id(buffer): buffer for buffer in buffers}.values():  # they may be one tensor
        inv_freq /= 2
    assert (got - logits(model, 30)).abs().max() < 2e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["yarn", "longrope"])
def test_formulas_for_unscaled_frequencies_refuse_and_name_both_scalings(name: str, strategy: str) -> None:
    model = MODELS[name]()
    stock = logits(model)
    scaling = "linear" if name == "gemma3" else name
    says = rf"^frequencies\.{strategy}: .*own \('{scaling}'\).*'{strategy}'.*replace=True"
    for arguments in ({"strategy": strategy}, {"strategy": "lampe", "mapping": 20, "frequencies": strategy}):
        with pytest.raises(posenc.InvalidConfigError, match=says):
            posenc.apply(model, **arguments)
        assert torch.equal(logits(model), stock)  # left unchanged
    picks: list[dict[str, Any]] = [
        {"up_to": 50, "pick": {"strategy": "rope", "because": "short"}},
        {"up_to": 5000, "pick": {"strategy": strategy, "because": "long"}},
    ]
    auto = posenc.strategy("auto", window=tiny.WINDOW, calibration={"ranges": picks})
    with pytest.raises(posenc.InvalidConfigError, match=says):
        posenc.apply(model, auto)


@pytest.mark.parametrize("name", ROPE)
def test_replace_starts_from_theta(name: str) -> None:
    model = llama(name)
    with posenc.apply(model, "yarn", factor=2.0, replace=True, window=tiny.WINDOW):
        got = logits(model, 30)
    plain = LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    plain.eval().load_state_dict(model.state_dict())
    with posenc.apply(plain, "yarn", factor=2.0):
        assert torch.equal(got, logits(plain, 30))


def test_the_attention_factor_of_the_checkpoint_is_multiplied() -> None:
    base = Rotary.from_theta(1e4, 16, attention_scaling=1.5)
    assert posenc.strategy("yarn", window=64, factor=4.0, attention_factor=1.2).rotary(base, 9).attention_scaling == (
        1.5 * 1.2
    )
    model = llama("yarn")
    scaling = model.model.rotary_emb.attention_scaling
    assert scaling > 1
    with posenc.apply(model, "ntk", factor=2.0) as handle:
        attachment = handle._attachment
        bases = attachment.bases(model.model, torch.zeros(1, 1, dtype=torch.long)).values()
        assert [handle.strategy.rotary(base.stock, 9).attention_scaling for base in bases] == [scaling]


def test_every_part_uses_the_window_that_the_checkpoint_was_trained_for() -> None:
    """With its llama3 scaling this model was trained to read 64 tokens; the scaling starts at 32."""
    model = llama("llama3")
    assert Loaded("a model", model, None).window == tiny.WINDOW
    assert fingerprint(model, find_adapter(model)).window == tiny.WINDOW
    with posenc.apply(model, "string") as handle:
        assert handle.describe()["window"] == tiny.WINDOW
    with posenc.apply(model, "string", window=32) as handle:
        assert handle.describe()["window"] == 32
