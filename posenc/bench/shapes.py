"""Shapes of what is measured: attention heads of raw tensors, models, and the rows of a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posenc.errors import InvalidInputError

HEADS = ("9/3x64",)
MODEL = "smollm2-135m"
"""Shapes that are measured by default: those of SmolLM2-135M."""

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
"""Llama configurations of the models that are measured, by name."""

ROW_SHARES = (4, 3, 2, 1)
"""Row lengths of a padded batch, in quarters of the longest row."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of raw tensors, written ``9/3x64``: query heads, key/value heads, head_dim."""

    query: int
    key: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Read ``HQ/HKVxD``.

        Raises
        ------
        InvalidInputError
            If the text is not three such numbers, or the numbers do not fit together.
        """
        try:
            pair, dim = text.split("x")
            query, key = pair.split("/")
            heads = cls(int(query), int(key), int(dim))
        except ValueError:
            raise InvalidInputError(f"heads {text!r}: expected HQ/HKVxD, such as 9/3x64.") from None
        if min(heads.query, heads.key, heads.dim) < 1 or heads.query % heads.key or heads.dim % 2:
            raise InvalidInputError(
                f"heads {text!r}: query heads must be a multiple of key/value heads, and head_dim even."
            )
        return heads


def row_lengths(longest: int) -> list[int]:
    """Lengths of the rows of a padded batch in tokens, the longest first."""
    return [max(1, longest * share // ROW_SHARES[0]) for share in ROW_SHARES]
