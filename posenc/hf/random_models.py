"""Make models with random weights, and empty caches, for benchmarks whose time does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch


def random_llama(dtype: torch.dtype, **config: Any) -> Any:
    """Make a Llama with fixed random weights and sdpa attention, in evaluation mode.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights.
    **config
        Passed to ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(**config, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return LlamaForCausalLM._from_config(llama, attn_implementation="sdpa").to(dtype).eval()


def empty_cache(config: Any) -> Any:
    """Make an empty dynamic KV cache for a model's configuration."""
    from transformers import DynamicCache

    return DynamicCache(config=config)
