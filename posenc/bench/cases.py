"""One comparison of a benchmark: its kind, and the case that the two sides are built from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from posenc import plugins
from posenc.positions import IdentityStrategy, PositionStrategy

STRATEGIES = ("lampe", "self_extend", "dca", "string", "rerope")
PLAIN = "rope"
"""The identity, which baselines run."""

CACHES = ("rotated", "raw")
"""What decoding reads: rotated keys kept beside the raw ones if the backend can use them, or raw keys alone."""

FLASH, CUDNN = "flash", "cudnn"
"""Further baselines: attention kernels alone, see :mod:`posenc.bench.baselines`."""

WINDOW_SHARE = 4
"""The pretraining window is the length divided by this, so that every segment of a plan is used."""

PADDED = ("padded_attention", "padded")
"""Kinds that compare a padded batch with its rows one by one; both sides are patched."""


@dataclass(frozen=True)
class BenchKind:
    """One thing that can be measured.

    Parameters
    ----------
    what : str
        What both sides compute.
    baseline : str
        What the plain side does.
    of_model : bool
        True for a whole model, False for raw tensors.
    cached : str
        What to add to `what` if rotated keys are kept.
    """

    what: str
    baseline: str
    of_model: bool
    cached: str = ""


KINDS = {
    "attention": BenchKind("attention of L queries over L raw keys", "rotation and one causal SDPA call", False),
    "query": BenchKind(
        "attention of one query over L raw keys",
        "rotation of the new token, SDPA over L rotated keys",
        False,
        cached=", with rotated keys kept too if the backend can use them",
    ),
    "prefill": BenchKind("a model's forward of L tokens with an empty cache", "the same model, not patched", True),
    "decode": BenchKind("a model's forward of one token with L cached tokens", "the same model, not patched", True),
    "padded_attention": BenchKind(
        "one layer's attention in a patched model for a padded batch of 4 rows, the longest of L tokens",
        "the same, row by row",
        False,
    ),
    "padded": BenchKind(
        "a patched model's forward of a padded batch of 4 rows, the longest of L tokens",
        "the same patched model, row by row",
        True,
    ),
}


@dataclass(frozen=True)
class BenchCase:
    """One comparison: a strategy against its baseline, everything else equal.

    Parameters
    ----------
    kind : str
        A name in ``KINDS``.
    shape : str
        Heads of the tensors, or the name of the model's shape.
    dtype : str
        Name of the torch dtype of tensors or weights.
    threads : int
        Torch threads.
    length : int
        Tokens.
    window : int
        Pretraining window in tokens that the strategy is made for.
    strategy, backend : str
        Names of plugins; ``"rope"`` is the identity.
    device : {"cpu", "cuda"}
        Where the case runs.
    cache : {"rotated", "raw"}
        Whether ``query`` keeps rotated keys from step to step.
    """

    kind: str
    shape: str
    dtype: str
    threads: int
    length: int
    window: int
    strategy: str
    backend: str
    device: str = "cpu"
    cache: str = CACHES[0]

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the strategy: its defaults, except a mapping for ``lampe`` that fits the window."""
        return {"mapping": max(1, 3 * self.window // 4)} if self.strategy == "lampe" else {}

    def make_strategy(self) -> PositionStrategy:
        """Make the strategy of the case.

        Raises
        ------
        UnknownNameError
            If no strategy of that name is installed.
        """
        if self.strategy == PLAIN:
            return IdentityStrategy(window=self.window)
        return plugins.strategy(self.strategy, window=self.window, **self.params)

    @property
    def baseline(self) -> BenchCase:
        """The case that stands for all cases with the same baseline."""
        if self.kind in PADDED:
            return self
        return replace(self, strategy=PLAIN, backend="auto", cache=CACHES[0])

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else f"{self.backend} on {self.device}"
        return f"{kind_shown(self.kind, self.cache)} {self.shape} {self.dtype} {self.strategy} {self.length}, {where}"


def kind_shown(kind: str, cache: str) -> str:
    """Name a kind in tables and messages: with its cache, unless that is the default."""
    return kind if cache == CACHES[0] else f"{kind} ({cache} keys)"


def what_of(kind: str, cache: str) -> str:
    """Say what both sides of a kind compute."""
    return KINDS[kind].what + (KINDS[kind].cached if cache == CACHES[0] else "")
