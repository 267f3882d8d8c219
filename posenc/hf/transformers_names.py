"""What transformers calls things, by version: the one place that knows.

Up to 5.23 the KV cache travels as ``past_key_values``, and continuous batching hands its paged cache down beside it
as ``cache``, for the attention function to update. From 5.24 on either one is ``cache``, and the layers update it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the KV cache in forwards and their outputs, today's first."""


def version() -> str:
    """The installed transformers."""
    import transformers

    return str(transformers.__version__)


def can_be_cropped(cache: Any) -> bool:
    """Whether a cache can be cut back: sliding layers forget what a cut would need, recurrent ones never had it."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def cache_keyword(module: nn.Module) -> str:
    """The name under which a module's forward takes the KV cache."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument that a module's forward takes."""
    return {cache_keyword(module): cache}


def paged_cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The paged cache of continuous batching among the arguments of a forward, or None."""
    cache = kwargs.get("cache")
    return cache if cache is not None and _is_paged(cache) else None


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a forward, whatever it is called there, or None."""
    found = (kwargs.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None and not _is_paged(cache)), None)


def returns_cache(output: Any) -> bool:
    """Whether a decoder's output has room for a KV cache."""
    return any(hasattr(output, name) for name in CACHE_NAMES)


def output_cache(output: Any) -> Any:
    """The KV cache in a model's output, or None; a tuple holds it somewhere."""
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def _is_paged(cache: Any) -> bool:
    # Not by its class, which takes a second to import and moves between versions.
    return type(cache).__name__ == "PagedAttentionCache"
