"""The only place that knows under which names each version of transformers passes its caches.

Up to transformers 5.23 the KV cache is passed as ``past_key_values``, and continuous batching passes its paged cache as
``cache``, which the attention function updates. From 5.24 on both are passed as ``cache``, and the layers update it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the KV cache in the arguments and outputs of forwards, the current one first."""


def version() -> str:
    """Return the version of the installed transformers."""
    import transformers

    return str(transformers.__version__)


def can_be_cropped(cache: Any) -> bool:
    """Return whether a cache can be cropped: sliding layers drop older keys, and recurrent layers have none."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def cache_keyword(module: nn.Module) -> str:
    """Return the name under which a module's forward takes the KV cache."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a KV cache as the keyword argument that a module's forward takes."""
    return {cache_keyword(module): cache}


def paged_cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the paged cache of continuous batching among the arguments of a forward, or None."""
    cache = kwargs.get("cache")
    return cache if cache is not None and _is_paged(cache) else None


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the KV cache among the arguments of a forward, under either name, or None."""
    caches = (kwargs.get(name) for name in CACHE_NAMES)
    return next((cache for cache in caches if cache is not None and not _is_paged(cache)), None)


def returns_cache(output: Any) -> bool:
    """Return whether a decoder's output has a field for the KV cache."""
    return any(hasattr(output, name) for name in CACHE_NAMES)


def output_cache(output: Any) -> Any:
    """Return the KV cache in a model's output (in a tuple, wherever it stands), or None."""
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def _is_paged(cache: Any) -> bool:
    # By name: importing the class takes a second, and its module differs between versions.
    return type(cache).__name__ == "PagedAttentionCache"
