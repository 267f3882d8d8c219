"""Adapters of families with declarations of their own, and one for every other decoder that the probe accepts."""

from __future__ import annotations

from posenc.adapter import EVERY_FAMILY, ArchitectureAdapter

FAMILIES = (
    ArchitectureAdapter("llama", "Llama 1 to 3 and models that share its code", ("llama",), style="half"),
    ArchitectureAdapter("mistral", "Mistral, with and without sliding window", ("mistral",), style="half"),
    ArchitectureAdapter("qwen", "Qwen2 and Qwen3, sliding layers included", ("qwen2", "qwen3"), style="half"),
    ArchitectureAdapter("generic", "every decoder of transformers that the probe finds exact", (EVERY_FAMILY,)),
)
