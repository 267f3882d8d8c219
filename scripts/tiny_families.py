"""A tiny random model of any causal-LM family of the installed transformers.

Every size that a configuration declares is shrunk by name; what a family needs on top is in OVERRIDES.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

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
    "bos_token_id": None,
    "eos_token_id": None,
}

OVERRIDES: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str, **extra: Any) -> Any:
    """The configuration of a family with every known size shrunk."""
    kind = CONFIG_MAPPING[model_type]
    values = {**sizes_for(kind), **OVERRIDES.get(model_type, {}), **extra}
    return kind(**values)


def sizes_for(kind: Any) -> dict[str, Any]:
    """Shrunk values of the arguments that a configuration class takes, sub-configurations included."""
    values: dict[str, Any] = {}
    aliases = getattr(kind, "attribute_map", {})
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        known = name if name in SIZES else next((k for k, v in aliases.items() if v == name and k in SIZES), None)
        if known is None:
            continue
        if parameter.default is None and known in ("sliding_window", "num_key_value_heads"):
            continue
        values[name] = SIZES[known]
    for name, sub in getattr(kind, "sub_configs", {}).items():
        if hasattr(sub, "__init__") and sub.__name__ != "AutoConfig":
            values[name] = {**sizes_for(sub), **OVERRIDES.get(getattr(sub, "model_type", ""), {})}
    return values


def tiny_model(model_type: str, attention: str | None = None, seed: int = 0, **extra: Any) -> Any:
    """A random model in eval mode whose norms, biases and sinks are not the trivial ones of a fresh model."""
    config = tiny_config(model_type, **extra)
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(
        config, **({"attn_implementation": attention} if attention else {})
    )
    model = model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim != 1:
                continue
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "sink" in name:
                weight.normal_(0, 0.3)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the padding id."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
