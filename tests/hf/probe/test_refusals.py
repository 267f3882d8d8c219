"""Bad input on models gives one clear message each, and leaves the model unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

import posenc
from tests.families.test_refused import state
from tests.hf import tiny


def small(config: type, model: type, **kwargs: Any) -> Any:
    return model(config(vocab_size=50, **kwargs)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(GPT2Config, GPT2LMHeadModel, n_embd=16, n_layer=1, n_head=2), "'gpt2'"),
        (
            lambda: small(
                FalconConfig, FalconForCausalLM, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=False
            ),
            "'falcon'",
        ),
        (
            lambda: small(T5Config, T5ForConditionalGeneration, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            "encoder-decoder",
        ),
        (lambda: torch.nn.Linear(2, 2), "posenc.attention"),
    ],
)
def test_unsupported_families_are_refused(make: Any, message: str) -> None:
    with pytest.raises(posenc.UnsupportedModelError, match=message):
        posenc.apply(make(), "lampe", mapping=30)


def test_a_model_without_a_rotary_module_is_refused() -> None:
    model = tiny.make("llama")
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(posenc.UnsupportedModelError, match="rotary"):
        posenc.apply(model, "lampe", mapping=30)


class NormAfterRotation(modeling_llama.LlamaAttention):
    """An attention with a learned norm after the rotation, which a cache of raw keys cannot serve."""

    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        original = modeling_llama.apply_rotary_pos_emb
        weight = torch.linspace(0.5, 1.5, self.head_dim)
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: tuple(x * weight for x in original(q, k, cos, sin))
        try:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        finally:
            modeling_llama.apply_rotary_pos_emb = original


class OwnAttention(modeling_llama.LlamaAttention):
    """An attention that never uses transformers' interface."""

    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        name, self.config._attn_implementation_internal = self.config._attn_implementation, "sdpa"
        try:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        finally:
            self.config._attn_implementation_internal = name


@pytest.mark.parametrize("attention", [NormAfterRotation, OwnAttention])
def test_attention_that_deviates_from_the_adapter_is_refused(attention: type) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    with torch.no_grad():
        stock = model(ids).logits
        with pytest.raises(posenc.UnsupportedModelError, match=r"after the rotation|AttentionInterface"):
            posenc.apply(model, "lampe", mapping=30)
        assert torch.equal(model(ids).logits, stock)
    assert posenc.attached(model) is None
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_implementation_that_cannot_be_replaced_is_refused() -> None:
    class Stubborn(LlamaModel):
        def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
            pass

    model = tiny.make("llama")
    model.model.__class__ = Stubborn
    with pytest.raises(posenc.UnsupportedModelError, match="AttentionInterface"):
        posenc.apply(model, "lampe", mapping=30)
    assert posenc.attached(model) is None


def test_an_unsupported_attention_implementation_is_named() -> None:
    model = tiny.make("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(posenc.UnsupportedModelError, match="flex_attention"):
        posenc.apply(model, "lampe", mapping=30)


def test_a_second_apply_is_refused_and_a_second_remove_is_harmless() -> None:
    model = tiny.make("llama")
    handle = posenc.apply(model, "lampe", mapping=30)
    with pytest.raises(posenc.UnsupportedModelError, match="already"):
        posenc.apply(model, "rerope")
    with pytest.raises(posenc.UnsupportedModelError, match="already"):
        posenc.apply(model.model, "rerope")
    handle.remove()
    handle.remove()
    assert not handle.is_active
    second = posenc.apply(model, "rerope")
    handle.remove()  # an old handle does not remove a newer one
    assert second.is_active
    second.remove()


@pytest.mark.parametrize("part", ["model.layers", "model.layers.0", "model.layers.0.self_attn", "model.rotary_emb"])
def test_a_part_of_a_model_is_refused(part: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    with torch.no_grad():
        stock = model(ids).logits
        with pytest.raises(posenc.UnsupportedModelError, match="Pass the whole model"):
            posenc.apply(model.get_submodule(part), "rerope", window_size=8)
        assert torch.equal(model(ids).logits, stock)
        with posenc.apply(model.model, "rerope", window_size=8) as handle:  # its decoder is a model in its own right
            assert not torch.equal(model(ids).logits, stock)
            assert handle.is_active
        assert torch.equal(model(ids).logits, stock)


class Int8Linear(torch.nn.Module):
    """A linear layer with 8-bit weights, as weight-only quantization makes it, without any float weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.step).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.step).T


def test_a_model_with_quantized_weights_is_served() -> None:
    model, twin, ids = tiny.make("llama"), tiny.make("llama"), tiny.tokens(1, 80)
    for layer, plain in zip(model.model.layers, twin.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            small = Int8Linear(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, small)
            with torch.no_grad():
                getattr(plain.self_attn, name).weight.copy_(small.weight * small.step)
    with torch.no_grad():
        stock = model(ids).logits
        with posenc.apply(model, "lampe", mapping=30, active_from=80):
            assert torch.equal(model(ids).logits, stock)
        with posenc.apply(model, "lampe", mapping=30), posenc.apply(twin, "lampe", mapping=30):
            assert (model(ids).logits - twin(ids).logits).abs().max() < 1e-5
        assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("lampee",), posenc.UnknownNameError, "'lampe'"),
        (("lampe", {"hed": 3}), posenc.InvalidConfigError, "lampe.hed"),
        (("lampe", {"head": -3}), posenc.InvalidConfigError, "lampe.head"),
        (("lampe", {"mapping": 30, "backend": "nonsense"}), posenc.UnknownNameError, "nonsense"),
        (("lampe", {"mapping": 30, "frequencies": "rerope"}), posenc.InvalidConfigError, "frequencies.name"),
        (("yarn", {"factor": 2, "frequencies": "ntk"}), posenc.InvalidConfigError, "yarn"),
        (("lampe", {"mapping": 30, "frequencies": 3}), posenc.InvalidConfigError, "frequencies"),
        ((42,), posenc.InvalidConfigError, "42"),
        (({"name": "lampe", "mapping": 30}, {"head": 3}), posenc.InvalidConfigError, "head"),
        ((Path("missing.yaml"),), posenc.InvalidConfigError, "missing.yaml"),
        (("missing.yaml",), posenc.InvalidConfigError, "missing.yaml"),
    ],
)
def test_wrong_strategies_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    model = tiny.make("llama")
    params = arguments[1] if len(arguments) > 1 else {}
    if params.get("frequencies") == "ntk":
        params = {**params, "frequencies": {"name": "ntk", "factor": 2}}
    with pytest.raises(error, match=message):
        posenc.apply(model, arguments[0], **params)
    assert posenc.attached(model) is None


def test_caches_of_other_strategies_are_refused() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    with torch.no_grad():
        stock, patched = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids, past_key_values=stock)
        with posenc.apply(model, "lampe", mapping=30):
            with pytest.raises(posenc.CacheMismatchError, match="without posenc"):
                model(ids, past_key_values=stock)
            model(ids, past_key_values=patched)
        with posenc.apply(model, "rerope", window_size=8), pytest.raises(posenc.CacheMismatchError, match="lampe"):
            model(ids, past_key_values=patched)
        model(ids, past_key_values=patched)  # filled without posenc, which does not know these tokens
        with posenc.apply(model, "lampe", mapping=30), pytest.raises(posenc.CacheMismatchError, match="saw only 30"):
            model(ids, past_key_values=patched)


def test_masks_that_are_not_padding_are_refused() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 30)
    square = torch.ones(30, 30, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    with torch.no_grad(), posenc.apply(model, "rerope", window_size=8):
        plain = model(ids).logits
        assert torch.equal(model(ids, attention_mask=square).logits, plain)
        hole = square.clone()
        hole[0, 0, 20, 4] = False
        with pytest.raises(posenc.InvalidInputError, match="4-D"):
            model(ids, attention_mask=hole)
        with pytest.raises(posenc.InvalidInputError, match=r"\[batch, tokens\]"):
            model(ids, attention_mask=torch.ones(30))
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with pytest.raises(posenc.InvalidInputError, match="covers 3 tokens"):
            model(ids[:, :1], attention_mask=torch.ones(2, 3), past_key_values=cache)


def test_packed_sequences_are_refused_under_a_remap() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    packed = torch.cat((torch.arange(12), torch.arange(18)))[None]
    with torch.no_grad(), posenc.apply(model, "rerope", window_size=8):
        with pytest.raises(posenc.InvalidInputError, match="packed"):
            model(ids, position_ids=packed, use_cache=False)
        shifted = model(ids, position_ids=torch.arange(7, 37)[None]).logits
        assert torch.allclose(shifted, model(ids).logits, atol=1e-5)


def test_a_remapped_forward_refuses_what_it_cannot_do() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    with posenc.apply(model, "rerope", window_size=8) as handle:
        with pytest.raises(posenc.BackendError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(posenc.InvalidInputError, match="no tokens"):
            model(ids[:, :0])
        with pytest.raises(posenc.InvalidInputError, match="at least 1"), handle.prompt_length(0):
            pass
        with pytest.raises(posenc.InvalidInputError, match="names 3 rows"), handle.prompt_length([9, 9, 9]):
            model(ids)
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(posenc.BackendError, match="dropout"):
            model(ids)
        model.eval()
        model.set_attn_implementation("eager")
        with pytest.raises(posenc.UnsupportedModelError, match="changed to 'eager'"):
            model(ids)


def test_a_row_of_padding_only_is_harmless() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0] = 0
    with torch.no_grad(), posenc.apply(model, "rerope", window_size=8):
        logits = model(ids, attention_mask=mask).logits
        assert bool(logits.isfinite().all())
        assert torch.allclose(logits[1], model(ids[1:]).logits[0], atol=1e-5)


def test_a_nan_stays_in_its_row() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 60)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), posenc.apply(model, "rerope", window_size=8):
        clean = model(inputs_embeds=embeddings).logits
        embeddings[0, 10] = torch.nan
        spoilt = model(inputs_embeds=embeddings).logits
    assert bool(spoilt[0, 10:].isnan().all())
    assert torch.equal(spoilt[1], clean[1])


def test_bad_model_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(posenc.InvalidConfigError, match="no such model folder"):
        posenc.from_pretrained(tmp_path / "nowhere", "lampe")
    with pytest.raises(posenc.InvalidConfigError, match=r"no posenc\.json"):
        posenc.from_pretrained(tmp_path)
    (tmp_path / "posenc.json").write_text("{")
    with pytest.raises(posenc.InvalidConfigError, match=r"posenc\.json"):
        posenc.from_pretrained(tmp_path)
    (tmp_path / "posenc.json").write_text('{"strategy": {"name": "rope"}}')
    with pytest.raises(posenc.InvalidInputError, match="transformers cannot load"):
        posenc.from_pretrained(tmp_path)


def test_a_strategy_that_breaks_the_partition_is_named() -> None:
    class Twice(posenc.PositionStrategy):
        name, summary, paper = "twice", "counts a pair twice", "none"

        def segments(self, lengths: posenc.Lengths) -> list[posenc.Segment]:
            index = lengths.indices
            return [
                posenc.Segment.band("near", lengths.total, 0, 5, index, index),
                posenc.Segment.band("far", lengths.total, 4, None, index, index),
            ]

    class Late(Twice):
        def segments(self, lengths: posenc.Lengths) -> list[posenc.Segment]:
            return super().segments(lengths) if lengths.total > 1200 else posenc.strategy("rope").segments(lengths)

    class Crashes(Twice):
        name = "crashes"

        def segments(self, lengths: posenc.Lengths) -> list[posenc.Segment]:
            return [1 / 0]  # type: ignore[list-item]

    class LayersOfNothing(Late):
        def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
            return None  # type: ignore[return-value]

    model = tiny.make("llama")
    before = state(model)
    for strategy, says in (
        (Twice(), r"strategy 'twice' made a wrong plan \(prompt 513, total 514\): .*j=0.*'near' and 'far'"),
        (Crashes(), r"strategy 'crashes' \(module .*\) fails to plan prompt 1, total 1: ZeroDivisionError"),
        (LayersOfNothing(), r"for_layer\(0, 2\) returns None"),
    ):
        with pytest.raises(posenc.PluginError, match=says):
            posenc.apply(model, strategy)
        assert posenc.attached(model) is None
        assert state(model) == before
    with torch.no_grad(), posenc.apply(model, Late()):
        model(tiny.tokens(1, 30))
        with pytest.raises(posenc.PluginError, match=r"prompt 1300, total 1300"):
            model(tiny.tokens(1, 1300))
        model(tiny.tokens(1, 30))
