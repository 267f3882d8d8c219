"""What is measured: kinds, cases, and the settings of one run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from posenc.errors import BackendError, InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from posenc.positions import PositionStrategy

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
STRATEGIES = ("lampe", "self_extend", "dca", "string", "rerope")
LENGTHS = (2048, 4096)
HEADS = ("9/3x64",)
MODEL = "smollm2-135m"
PLAIN = "rope"
"""The identity, which baselines run."""
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
"""Configurations of the models that are measured, by name."""

CACHES = ("rotated", "raw")
"""What decoding reads: rotated keys kept beside the raw ones where a backend can use them, or raw keys alone."""

FLASH, CUDNN = "flash", "cudnn"
"""Baselines beside plain: attention kernels alone, see :mod:`posenc.bench.baselines`."""

WINDOW_SHARE = 4
"""The pretraining window is this share of the length, so that every segment is at work."""


@dataclass(frozen=True)
class Kind:
    """One thing that can be measured.

    Parameters
    ----------
    what : str
        What both sides compute.
    baseline : str
        The side it is held against.
    of_model : bool
        A whole model rather than tensors.
    """

    what: str
    baseline: str
    of_model: bool


KINDS = {
    "attention": Kind("attention of L queries over L raw keys", "rotation and one causal SDPA call", False),
    "query": Kind(
        "attention of one query over L raw keys, with kept rotated ones where the backend can use them",
        "rotation of the new token, SDPA over L rotated keys",
        False,
    ),
    "prefill": Kind("model forward of a prompt of L tokens", "the same model, not patched", True),
    "decode": Kind("model forward of one token at L cached ones", "the same model, not patched", True),
    "padded_attention": Kind(
        "one layer's attention of a patched model for a padded batch of 4 rows, the longest L tokens",
        "the same, row by row",
        False,
    ),
    "padded": Kind(
        "model forward of a padded batch of 4 rows, the longest L tokens", "the patched model, row by row", True
    ),
}

PADDED = ("padded_attention", "padded")
ROW_SHARES = (4, 3, 2, 1)
"""Rows of a padded batch, in quarters of the longest."""


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
            If it is not three such numbers, or they do not fit together.
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


@dataclass(frozen=True)
class Case:
    """One comparison: a strategy against its baseline, everything else equal.

    Parameters
    ----------
    kind : str
        A name in ``KINDS``.
    shape : str
        Heads of the tensors, or the name of the model's shape.
    length, window : int
        Tokens, and the pretraining window the strategy is made for.
    cache : {"rotated", "raw"}
        Of ``query``: whether rotated keys are kept from step to step.
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
        """Parameters of the strategy: its own defaults, but a mapping for ``lampe`` that fits the window."""
        return {"mapping": max(1, 3 * self.window // 4)} if self.strategy == "lampe" else {}

    def make_strategy(self) -> PositionStrategy:
        """The strategy of the case."""
        from posenc.plugins import strategy
        from posenc.positions import IdentityStrategy

        if self.strategy == PLAIN:
            return IdentityStrategy(window=self.window)
        return strategy(self.strategy, window=self.window, **self.params)

    @property
    def baseline(self) -> Case:
        """What this case shares with every other one that has the same baseline."""
        if self.kind in PADDED:  # its baseline is patched as well
            return self
        return replace(self, strategy=PLAIN, backend="auto", cache=CACHES[0])

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else f"{self.backend} on {self.device}"
        return f"{kind_shown(self.kind, self.cache)} {self.shape} {self.dtype} {self.strategy} {self.length}, {where}"


def kind_shown(kind: str, cache: str) -> str:
    """A kind as tables and messages name it: with what it reads where that is not the usual cache."""
    return kind if cache == CACHES[0] else f"{kind} ({cache} keys)"


def what_of(kind: str, cache: str) -> str:
    """What both sides of a kind compute."""
    return KINDS[kind].what if cache == CACHES[0] else KINDS[kind].what.partition(", with kept")[0]


def row_lengths(case: Case) -> list[int]:
    """Tokens of the rows of a padded batch, the longest first."""
    return [max(1, case.length * share // ROW_SHARES[0]) for share in ROW_SHARES]


@dataclass(frozen=True)
class Settings:
    """One run: every combination of these is a case.

    Parameters
    ----------
    kinds, strategies, lengths, heads, dtypes, threads, backends : tuple
        What to combine; `heads` is for tensors only, `model` for models only.
    rounds : int
        Most rounds per case, a round being the baseline and then the remapped side.
    seconds : float
        No further round starts once a case has used this time and has three.
    caches : tuple of str
        Names in ``CACHES``, for ``query`` alone.
    """

    kinds: tuple[str, ...] = ("attention",)
    strategies: tuple[str, ...] = STRATEGIES
    lengths: tuple[int, ...] = LENGTHS
    heads: tuple[str, ...] = HEADS
    model: str = MODEL
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (2,)
    backends: tuple[str, ...] = ("auto",)
    window_share: int = WINDOW_SHARE
    rounds: int = 7
    seconds: float = 20.0
    memory: bool = True
    device: str = "cpu"
    caches: tuple[str, ...] = CACHES[:1]

    def cases(self) -> list[Case]:
        """All cases, those with the same baseline next to each other."""
        found = []
        for kind in self.kinds:
            shapes = (self.model,) if KINDS[kind].of_model else self.heads
            caches = self.caches if kind == "query" else CACHES[:1]
            for shape, dtype, threads, length, cache, backend, strategy in product(
                shapes, self.dtypes, self.threads, self.lengths, caches, self.backends, self.strategies
            ):
                window = length // self.window_share
                found.append(Case(kind, shape, dtype, threads, length, window, strategy, backend, self.device, cache))
        return found

    def check(self) -> None:
        """Raise now for what would fail after minutes of measuring.

        Raises
        ------
        InvalidInputError
            If a number is out of range or a name of a kind, shape or dtype is unknown.
        UnknownNameError
            If no strategy or backend of that name is installed.
        BackendError
            If the device is not here, or a backend cannot run a dtype on it.
        """
        _known("kind", self.kinds, tuple(KINDS))
        _known("device", (self.device,), DEVICES)
        _check_device(self.device, self.kinds)
        _known("dtype", self.dtypes, DTYPES)
        _known("cache", self.caches, CACHES)
        shortest = self.window_share
        for name, values, least in (
            ("window share", (self.window_share,), 1),
            ("rounds", (self.rounds,), 1),
            ("threads", self.threads, 1),
            ("length", self.lengths, shortest),
        ):
            for value in values:
                if value < least:
                    raise InvalidInputError(f"{name} {value}: must be at least {least}.")
        for heads in self.heads:
            Heads.parse(heads)
        if any(KINDS[kind].of_model for kind in self.kinds):
            _known("model shape", (self.model,), tuple(SHAPES))
        for name, dtype in product(self.backends, self.dtypes):
            _check_backend(name, dtype, self.device)
        for case in self.cases():
            case.make_strategy()

    def command(self) -> str:
        """The command line that repeats this run."""
        default = Settings()
        words = ["posenc", "bench", *self.kinds]
        on_model = [KINDS[kind].of_model for kind in self.kinds]
        words += [word for name in self.strategies for word in ("--strategy", name)]
        words += ["--lengths", _numbers(self.lengths)]
        if not all(on_model):
            words += [word for heads in self.heads for word in ("--heads", heads)]
        if any(on_model):
            words += ["--model", self.model]
        words += [word for dtype in self.dtypes for word in ("--dtype", dtype)]
        words += ["--threads", _numbers(self.threads)]
        words += [word for backend in self.backends for word in ("--backend", backend)]
        words += ["--rounds", str(self.rounds), "--seconds", f"{self.seconds:g}"]
        if self.window_share != default.window_share:
            words += ["--window-share", str(self.window_share)]
        if not self.memory:
            words += ["--no-memory"]
        if self.device != default.device:
            words += ["--device", self.device]
        if self.caches != default.caches:
            words += [word for cache in self.caches for word in ("--cache", cache)]
        return shlex.join(words)


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _known(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(f"no {what} named {name!r}. Known: {', '.join(known)}.")


def _check_device(device: str, kinds: tuple[str, ...]) -> None:
    if device == "cpu":
        return
    import torch

    models = [kind for kind in kinds if KINDS[kind].of_model]
    if models:
        raise InvalidInputError(f"{models[0]} is measured on the CPU only: give attention or query with --device.")
    if not torch.cuda.is_available():
        raise BackendError("there is no CUDA GPU here, or this build of torch cannot use it (posenc doctor says more).")


def _check_backend(name: str, dtype: str, device: str) -> None:
    import torch

    from posenc.plugins import backends

    if name == "auto":
        return
    sample = torch.zeros(1, 1, 1, 2, dtype=getattr(torch, dtype), device=device)
    reason = backends()[name].backend.refuses(sample, sample, sample, None)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {dtype} here: {reason}.")
