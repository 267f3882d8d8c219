"""The settings of one run of ``posenc bench``: every combination of them is a case."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import product

import torch

from posenc import plugins
from posenc.bench.cases import CACHES, KINDS, STRATEGIES, WINDOW_SHARE, BenchCase
from posenc.bench.shapes import HEADS, MODEL, SHAPES, Heads
from posenc.errors import BackendError, InvalidInputError, UnknownNameError

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (2048, 4096)


@dataclass(frozen=True)
class BenchSettings:
    """One run: every combination of these is a case.

    Parameters
    ----------
    kinds, strategies, lengths, dtypes, threads, backends : tuple
        What to combine.
    heads : tuple of str
        Heads of raw tensors, combined for kinds that measure tensors.
    model : str
        A name in ``SHAPES``, for kinds that measure a model.
    window_share : int
        The window is the length divided by this.
    rounds : int
        Most rounds per case; a round calls the baseline and then the remapped side.
    seconds : float
        No further round starts after a case has used this time and has had three.
    memory : bool
        Whether to measure peak memory too.
    device : {"cpu", "cuda"}
        Where all cases run.
    caches : tuple of str
        Names in ``CACHES``, combined for ``query`` only.
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

    def cases(self) -> list[BenchCase]:
        """List all cases, those with the same baseline next to each other."""
        cases = []
        for kind in self.kinds:
            shapes = (self.model,) if KINDS[kind].of_model else self.heads
            caches = self.caches if kind == "query" else CACHES[:1]
            for shape, dtype, threads, length, cache, backend, strategy in product(
                shapes, self.dtypes, self.threads, self.lengths, caches, self.backends, self.strategies
            ):
                window = length // self.window_share
                cases.append(
                    BenchCase(kind, shape, dtype, threads, length, window, strategy, backend, self.device, cache)
                )
        return cases

    def check(self) -> None:
        """Raise now for what would fail after minutes of measuring.

        Raises
        ------
        InvalidInputError
            If a number is out of range, heads are malformed, or a kind cannot run on the device.
        UnknownNameError
            If a kind, device, dtype, cache or model shape is unknown, or a strategy or backend is not installed.
        BackendError
            If the device is missing, or a backend cannot run a dtype on it.
        """
        _check_names("kind", self.kinds, tuple(KINDS))
        _check_names("device", (self.device,), DEVICES)
        _check_device(self.device, self.kinds)
        _check_names("dtype", self.dtypes, DTYPES)
        _check_names("cache", self.caches, CACHES)
        self._check_numbers()
        for heads in self.heads:
            Heads.parse(heads)
        if any(KINDS[kind].of_model for kind in self.kinds):
            _check_names("model shape", (self.model,), tuple(SHAPES))
        for name, dtype in product(self.backends, self.dtypes):
            _check_backend(name, dtype, self.device)
        for case in self.cases():
            case.make_strategy()

    def _check_numbers(self) -> None:
        for name, values, least in (
            ("window share", (self.window_share,), 1),
            ("rounds", (self.rounds,), 1),
            ("threads", self.threads, 1),
            ("length", self.lengths, self.window_share),  # a window of one token
        ):
            for value in values:
                if value < least:
                    raise InvalidInputError(f"{name} {value}: must be at least {least}.")

    def command(self) -> str:
        """The command line that repeats this run."""
        default = BenchSettings()
        of_model = [KINDS[kind].of_model for kind in self.kinds]
        words = ["posenc", "bench", *self.kinds, *_repeated("--strategy", self.strategies)]
        words += ["--lengths", _numbers(self.lengths)]
        if not all(of_model):
            words += _repeated("--heads", self.heads)
        if any(of_model):
            words += ["--model", self.model]
        words += _repeated("--dtype", self.dtypes)
        words += ["--threads", _numbers(self.threads)]
        words += _repeated("--backend", self.backends)
        words += ["--rounds", str(self.rounds), "--seconds", f"{self.seconds:g}"]
        if self.window_share != default.window_share:
            words += ["--window-share", str(self.window_share)]
        if not self.memory:
            words += ["--no-memory"]
        if self.device != default.device:
            words += ["--device", self.device]
        if self.caches != default.caches:
            words += _repeated("--cache", self.caches)
        return shlex.join(words)


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _repeated(option: str, values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _check_names(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise UnknownNameError(f"no {what} named {name!r}. Known: {', '.join(known)}.")


def _check_device(device: str, kinds: tuple[str, ...]) -> None:
    if device == "cpu":
        return
    models = [kind for kind in kinds if KINDS[kind].of_model]
    if models:
        raise InvalidInputError(f"{models[0]} is measured on the CPU only: give attention or query with --device.")
    if not torch.cuda.is_available():
        raise BackendError("there is no CUDA GPU here, or this build of torch cannot use it (posenc doctor says more).")


def _check_backend(name: str, dtype: str, device: str) -> None:
    if name == "auto":
        return
    sample = torch.zeros(1, 1, 1, 2, dtype=getattr(torch, dtype), device=device)
    reason = plugins.backends()[name].backend.refuses(sample, sample, sample, None)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {dtype} here: {reason}.")
