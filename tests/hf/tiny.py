"""Tiny random models of supported families, and plans as dense positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posenc.positions import PositionStrategy
from posenc.rope import Rotary
from tests.hf.dense import Positions

WINDOW = 64
VOCAB = 97
LAMPE: dict[str, Any] = {"head": 8, "tail": 5, "mapping": 30}
"""Parameters of lampe for this window."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.3,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2_sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}

SCALINGS: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": WINDOW,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def scaled(kind: str) -> Any:
    """Return a llama whose own frequencies follow the length."""
    torch.manual_seed(0)
    longest = 4 * WINDOW if kind == "longrope" else WINDOW
    shape = {**SHAPE, "max_position_embeddings": longest}
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=dict(SCALINGS[kind]))).eval()


def make(family: str, seed: int = 0) -> Any:
    """Return a model in eval mode whose norms and biases differ from their trivial initial values."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.3)
    return model


def shallow(family: str) -> Any:
    """Return the model with only its first layer, for torch.compile, which takes seconds per layer."""
    model = make(family)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return random token ids without the padding id."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def decoded(model: Any, ids: torch.Tensor, prompt: int, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return logits [B, L, vocab] of a prompt and of the tokens after it, decoded one by one."""
    parts = []
    for low, high in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :high]
        parts.append(model(ids[:, low:high], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(parts, 1)


def positions(model: Any, strategy: PositionStrategy, prompt: int, total: int) -> Positions:
    """Return dense positions of a plan, for the dense decoder.

    Frequencies that follow the length are those of the prompt for the prompt's queries, and those of the length
    so far for every token decoded past the window.
    """
    plan = strategy.plan(prompt, total)
    scale = np.ones(total) if plan.query_scale is None else plan.query_scale
    module = model.model.rotary_emb
    base = Rotary(module.inv_freq, module.attention_scaling, theta=model.config.rope_parameters["rope_theta"])
    follows = strategy.capabilities.frequencies_by_length
    lengths = [i + 1 if follows and i >= max(prompt, WINDOW) else prompt for i in range(total)]
    rotaries = {length: strategy.rotary(base, length) for length in set(lengths)}
    inv_freq = torch.stack([rotaries[length].inv_freq for length in lengths])
    factor = torch.tensor([rotaries[length].attention_scaling for length in lengths])
    return Positions(plan.relative_positions(), scale, inv_freq, factor, np.zeros((total, total), dtype=bool))
