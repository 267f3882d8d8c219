"""A tiny random model of any causal-LM family of the installed transformers.

Every size that a configuration declares is shrunk by name; OVERRIDES has anything else that a family needs.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from posenc.testing.models import tokens as random_tokens

WINDOW = 64
VOCAB = 128
SLIDING = 16

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    "sliding_window": SLIDING,
    "local_attention": 2 * SLIDING,
    "initializer_range": 0.3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "attention_chunk_size": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("full_attention", 5e5), ("sliding_attention", 1e4))
        },
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": WINDOW,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"position_embedding_type": "rope", "layer_types": HYBRID},
    "helium": {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 8},
    "hrm_text": {"initializer_range": 0.1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 8,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "ffn_hidden_size": 48,
    },
    "moshi": {"audio_vocab_size": 32, "ffn_dim": 48, "sliding_window": WINDOW},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_mem_rope": True,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": SLIDING},
}


def tiny_config(model_type: str, **extra: Any) -> Any:
    """Return the configuration of a family with every known size shrunk."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**sizes_for(kind), **extra})


def sizes_for(kind: Any) -> dict[str, Any]:
    """Return shrunk values of the arguments that a configuration class takes, including sub-configurations."""
    values: dict[str, Any] = {}
    aliases = {alias: name for name, alias in getattr(kind, "attribute_map", {}).items()}
    parameters = inspect.signature(kind.__init__).parameters
    for name, parameter in parameters.items():
        size = name if name in SIZES else aliases.get(name)
        if size in SIZES and not (parameter.default is None and size == "sliding_window"):
            values[name] = SIZES[size]
    if "kv_lora_rank" in parameters:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in ("layer_types", "layers_block_type"):
        if name in parameters and (types := _types(kind, name)):
            values[name] = types
    for name, sub in getattr(kind, "sub_configs", {}).items():
        if sub.__name__ != "AutoConfig":
            values[name] = sizes_for(sub)
        elif (default := getattr(kind(), name, None)) is not None:
            values[name] = {**sizes_for(type(default)), "model_type": default.model_type}
    return {**values, **OVERRIDES.get(getattr(kind, "model_type", ""), {})}


def _types(kind: Any, name: str) -> list[str] | None:
    """Return the types of four layers that cover the layer types of the family's default configuration."""
    declared = getattr(kind(), name, None)
    if not declared:
        return None
    distinct = list(dict.fromkeys(declared))
    layers = SIZES["num_hidden_layers"]
    return [distinct[index % len(distinct)] for index in range(layers)]


def tiny_model(model_type: str, attention: str | None = None, seed: int = 0, **extra: Any) -> Any:
    """Return a random model in eval mode whose norms, biases and sinks differ from their trivial initial values."""
    config = tiny_config(model_type, **extra)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config) and config.get_text_config(decoder=True) is not config:
        config = config.get_text_config(decoder=True)  # as AutoModelForCausalLM does for the text part of a family
    torch.manual_seed(seed)
    model = kind._from_config(config, **({"attn_implementation": attention} if attention else {})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not bool(weight.any()):
                weight.normal_(0, 0.3)
            if weight.ndim != 1:
                continue
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "sink" in name:
                weight.normal_(0, 0.3)
    return model


tokens = partial(random_tokens, VOCAB)
"""Return random token ids without the padding id."""
