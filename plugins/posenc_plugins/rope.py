"""RoPE itself: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864."""

from __future__ import annotations

from posenc.positions import IdentityStrategy


class PlainRoPE(IdentityStrategy):
    """The identity strategy, as the registry names it."""
