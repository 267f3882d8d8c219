"""The families that keep their parts where transformers' Llama does."""

from __future__ import annotations

from posenc.adapter import ArchitectureAdapter

FAMILIES = (
    ArchitectureAdapter("llama", "Llama 1 to 3 and models that share its code", ("llama",)),
    ArchitectureAdapter("mistral", "Mistral, with and without sliding window", ("mistral",)),
    ArchitectureAdapter("qwen", "Qwen2 and Qwen3, sliding layers included", ("qwen2", "qwen3")),
)
