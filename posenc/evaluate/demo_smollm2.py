"""The demo on a real pretrained model: passkeys inside and beyond SmolLM2's window of 8192 tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posenc.config import Config, read_config
from posenc.errors import InvalidInputError
from posenc.evaluate.models import Loaded
from posenc.evaluate.tasks.base import Source, Subject
from posenc.evaluate.tasks.passkey import SinglePasskey

LENGTHS = (2048, 4096, 12288)
DEPTHS = (0.1, 0.5, 0.9)
SEED = 0
SECONDS, SECONDS_PER_TOKEN, SECONDS_PER_PAIR = 2.0, 5e-3, 1e-7
"""Fitted to one prompt with one of two CPU cores free: 9 s at 2048 tokens, 30 s at 4096, 85 s at 12288."""


class PasskeyPrompt(NamedTuple):
    """A pass key hidden at one depth of a prompt of one length."""

    length: int
    task: SinglePasskey


@dataclass
class Answers:
    """What one strategy answered."""

    config: Config
    rows: list[dict[str, Any]] = field(default_factory=list)

    def by_length(self) -> dict[int, tuple[int, int]]:
        """Per length the number of prompts answered with the whole key, and the number of prompts."""
        by_length: dict[int, list[float]] = {}
        for row in sorted(self.rows, key=lambda row: int(row["length"])):
            by_length.setdefault(row["length"], []).append(row["score"])
        return {length: (scores.count(1.0), len(scores)) for length, scores in by_length.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with every answer."""
        return {"config": self.config.as_dict(), "answers": self.rows}


def configs() -> dict[str, Config]:
    """Native against LaMPE with a constant mapping length of 5120 positions."""
    lampe = {"name": "lampe", "mapping": 5120, "head": 512, "tail": 200}
    return {
        "native (plain RoPE)": read_config({"strategy": "rope"}),
        "lampe (mapping=5120)": read_config({"strategy": lampe}),
    }


def make_prompts(source: Source, lengths: Sequence[int], depths: Sequence[float]) -> list[PasskeyPrompt]:
    """Prompts in the order in which they are asked: the shorter ones first, so that answers soon appear.

    Raises
    ------
    InvalidInputError
        If a depth or a length is out of range, a length has no room for the sentences, or the text is too short.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InvalidInputError(f"depth: must lie between 0 and 1, got {depth}.")
    for length in lengths:
        if length < 1:
            raise InvalidInputError(f"length {length}: must be at least 1 token.")
    tasks = [SinglePasskey(depth=depth, documents=1) for depth in depths]
    prompts = [PasskeyPrompt(length, task) for length in sorted(lengths) for task in tasks]
    for length, task in prompts:
        task.check(source, length, SEED)
    return prompts


def estimate_seconds(prompts: Sequence[PasskeyPrompt], strategies: int) -> float:
    """Rough time for all prompts, to tell users before it starts."""
    lengths = [prompt.length for prompt in prompts]
    return strategies * sum(SECONDS + SECONDS_PER_TOKEN * n + SECONDS_PER_PAIR * n**2 for n in lengths)


def run(
    loaded: Loaded,
    source: Source,
    prompts: Sequence[PasskeyPrompt],
    configs: Mapping[str, Config],
    step: Callable[[str], None] = lambda description: None,
) -> dict[str, Answers]:
    """Ask every prompt under every configuration."""
    answers = {label: Answers(config) for label, config in configs.items()}
    for length, task in prompts:
        for strategy_answers in answers.values():
            began = time.perf_counter()
            with Subject.under(loaded, strategy_answers.config) as subject:
                (sample,) = task.measure(subject, source, length, SEED)
            strategy_answers.rows.append(
                {
                    "length": length,
                    "depth": task.depth,
                    "key": sample.expected,
                    "answer": sample.answer,
                    "score": sample.score,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            step(f"{length} tokens, depth {task.depth:g}")
    return answers
