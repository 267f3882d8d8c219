"""Models with random weights and empty caches, for measurements whose time does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch


def random_llama(dtype: torch.dtype, **config: Any) -> Any:
    """A Llama of the given configuration with fixed random weights, under sdpa attention, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(**config, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return LlamaForCausalLM._from_config(llama, attn_implementation="sdpa").to(dtype).eval()


def empty_cache(config: Any) -> Any:
    """A dynamic KV cache for a model's configuration."""
    from transformers import DynamicCache

    return DynamicCache(config=config)
