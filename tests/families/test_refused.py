"""Models that cannot be exact are refused with the reason, and stay exactly as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.llama import modeling_llama

import posenc
from posenc.hf.hooks import HOOKS
from scripts.tiny_families import SIZES, WINDOW, tiny_model, tokens

REFUSED = {
    "falcon": "AttentionInterface",
    "gptj": "no rotary module",
    "gpt2": "no rotary module",
    "bart": "no rotary module",
    "hunyuan_v1_dense": "norm after the rotation",
    "nanochat": "norm after the rotation",
    "deepseek_v32": "sparse indexer",
    "llama4_text": "chunked",
    "doge": "mask",
    "recurrent_gemma": "inside its layers",
}


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Return everything that attaching could leave behind, as comparable data."""
    return {
        name: (
            type(part),
            part.training,
            len(part._forward_hooks),
            len(part._forward_pre_hooks),
            {key: id(value) for key, value in vars(part).items() if key not in ("_modules", "_parameters", "_buffers")},
            {
                key: (id(value), value._version)
                for key, value in (*part._buffers.items(), *part._parameters.items())
                if value is not None
            },
        )
        for name, part in model.named_modules()
    }


def refuse(model: Any, message: str, **params: Any) -> None:
    before, config = state(model), model.config.to_dict()
    implementation = model.config._attn_implementation
    random = torch.random.get_rng_state()
    with pytest.raises(posenc.UnsupportedModelError, match=message):
        posenc.apply(model, "lampe", mapping=30, window=WINDOW, **params)
    assert state(model) == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.random.get_rng_state(), random)
    assert posenc.attached(model) is None


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_families_are_refused_with_the_reason(family: str) -> None:
    model, ids = tiny_model(family), tokens(1, 20)
    model.train()
    model.get_submodule(next(name for name, _ in model.named_children())).training = False
    refuse(model, REFUSED[family])
    with torch.no_grad():
        model.eval()(ids, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text", "deepseek_v2"])
def test_attach_and_detach_leave_no_trace(family: str) -> None:
    model = tiny_model(family).train()
    model.lm_head.eval()
    before, random = state(model), torch.random.get_rng_state()
    with posenc.apply(model, "lampe", mapping=30, window=WINDOW):
        hooks = [
            h for part in model.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        ]
        assert len(hooks) > 2
        assert all(isinstance(hook, HOOKS) for hook in hooks)
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_positions_of_several_dimensions_are_refused() -> None:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    refuse(model, "mrope")


def llama() -> Any:
    return tiny_model("llama")


def deviate(model: Any, kind: type, layer: int = -1) -> Any:
    """Make only one layer deviate, so that probing only the first one would not be enough."""
    model.model.layers[layer].self_attn.__class__ = kind
    return model


class NormAfterRotation(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        original = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda *args: tuple(
            x / x.norm(dim=-1, keepdim=True) for x in original(*args)
        )
        try:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        finally:
            modeling_llama.apply_rotary_pos_emb = original


class RotatedValues(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return super().forward(hidden_states * cos.mean(-1, keepdim=True), position_embeddings=(cos, sin), **kwargs)


class OtherFrequencies(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        flipped = tuple(x.flip(-1) for x in position_embeddings)
        return super().forward(hidden_states, position_embeddings=flipped, **kwargs)


class AsymmetricRotation(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        original = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: (original(q, k, cos, sin)[0], k)
        try:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        finally:
            modeling_llama.apply_rotary_pos_emb = original


class OwnMask(modeling_llama.LlamaAttention):
    def forward(
        self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None, **kw: Any
    ) -> Any:
        mask = None if attention_mask is None else attention_mask.clone()
        return super().forward(hidden_states, position_embeddings=position_embeddings, attention_mask=mask, **kw)


class PositionBias(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        bias = torch.linspace(-1, 1, self.config.num_attention_heads)[None, :, None, None]
        length = hidden_states.shape[1]
        slope = torch.arange(12)[None, :].float() if length == 1 else torch.arange(length)[None, :].float()
        return super().forward(
            hidden_states, position_embeddings=position_embeddings, position_bias=bias * slope, **kwargs
        )


class Softcap(modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, position_embeddings=position_embeddings, softcap=5.0, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NormAfterRotation, "layers.3.self_attn.*norm after the rotation"),
        (RotatedValues, "layers.3.self_attn.*values depend on the rotation"),
        (OtherFrequencies, "layers.3.self_attn.*position 29 differs"),
        (AsymmetricRotation, "layers.3.self_attn.*only its queries are rotated"),
        (OwnMask, "layers.3.self_attn.*mask"),
        (PositionBias, "layers.3.self_attn.*not a softmax"),
        (Softcap, "softcap"),
    ],
)
def test_one_deviating_layer_is_refused(kind: type, message: str) -> None:
    refuse(deviate(llama(), kind), message)


def test_a_declared_style_that_is_not_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = posenc.adapters()["llama"].adapter
    monkeypatch.setitem(vars(adapter), "style", "interleaved")
    refuse(llama(), "'half', and the adapter 'llama' declares 'interleaved'")


def test_attention_layers_added_after_the_probe_are_refused() -> None:
    model, ids = llama(), tokens(1, 20)
    with torch.no_grad(), posenc.apply(model, "lampe", mapping=30, window=WINDOW):
        model.model.layers[1].self_attn = modeling_llama.LlamaAttention(model.config, 1)
        with pytest.raises(posenc.UnsupportedModelError, match="not probed"):
            model(ids)


def test_an_attention_layer_called_without_its_decoder_is_refused() -> None:
    model = tiny_model("stablelm")
    hidden, table = torch.randn(1, 5, 32), torch.ones(1, 5, 2)
    with torch.no_grad(), posenc.apply(model, "lampe", mapping=30, window=WINDOW):
        with pytest.raises(posenc.UnsupportedModelError, match="outside its decoder"):
            model.model.layers[0].self_attn(hidden, position_embeddings=(table, table))
        model(tokens(1, 20))
        with pytest.raises(posenc.UnsupportedModelError, match="outside its decoder"):
            model.model.layers[0].self_attn(hidden, position_embeddings=(table, table))


def test_a_softcap_that_the_models_attention_ignores_is_refused() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    refuse(deviate(model, Softcap), "layers.3.self_attn.*eager attention is not a softmax")
