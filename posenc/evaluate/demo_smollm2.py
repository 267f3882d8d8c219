"""The main job on a real pretrained model: passkeys inside and beyond SmolLM2's window of 8192 tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posenc.config import Config, read_config
from posenc.evaluate.models import Loaded
from posenc.evaluate.passkey import Passkey, answer, make_passkey, score, table
from posenc.evaluate.texts import Text, tokenize
from posenc.hf.apply import apply

LENGTHS = (2048, 4096, 12288)
DEPTHS = (0.1, 0.5, 0.9)
SECONDS, SECONDS_PER_TOKEN, SECONDS_PER_PAIR = 2.0, 5e-3, 1e-7
"""Measured for one prompt with one of two CPU cores free: 9 s at 2048 tokens, 30 s at 4096, 85 s at 12288."""


@dataclass
class Answers:
    """What one strategy answered."""

    config: Config
    rows: list[dict[str, Any]] = field(default_factory=list)

    def by_length(self) -> dict[int, tuple[int, int]]:
        """Per length: prompts answered with the whole key, and prompts asked."""
        return table([(row["length"], row["score"]) for row in self.rows])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every answer included."""
        return {"config": self.config.as_dict(), "answers": self.rows}


def configs() -> dict[str, Config]:
    """Native against LaMPE with a constant mapping length of 5120 positions."""
    lampe = {"name": "lampe", "mapping": 5120, "head": 512, "tail": 200}
    return {
        "native (plain RoPE)": read_config({"strategy": "rope"}),
        "lampe (mapping=5120)": read_config({"strategy": lampe}),
    }


def make_prompts(loaded: Loaded, text: Text, lengths: Sequence[int], depths: Sequence[float]) -> list[Passkey]:
    """Prompts in the order asked: shorter ones first, so that something is to be seen early."""
    haystack = tokenize(loaded.tokenizer, text)
    return [make_passkey(loaded.tokenizer, haystack, length, depth) for length in sorted(lengths) for depth in depths]


def estimate_seconds(prompts: Sequence[Passkey], strategies: int) -> float:
    """Rough time for all prompts, to tell people up front what they start."""
    lengths = [len(prompt.tokens) for prompt in prompts]
    return strategies * sum(SECONDS + SECONDS_PER_TOKEN * n + SECONDS_PER_PAIR * n**2 for n in lengths)


def run(
    loaded: Loaded,
    prompts: Sequence[Passkey],
    chosen: Mapping[str, Config],
    step: Callable[[str], None] | None = None,
) -> dict[str, Answers]:
    """Ask every prompt under every configuration."""
    answers = {label: Answers(config) for label, config in chosen.items()}
    for prompt in prompts:
        for label, config in chosen.items():
            began = time.perf_counter()
            with apply(loaded.model, config):
                said = answer(loaded.model, loaded.tokenizer, prompt)
            answers[label].rows.append(
                {
                    "length": len(prompt.tokens),
                    "depth": prompt.depth,
                    "key": prompt.key,
                    "answer": said,
                    "score": score(said, prompt.key),
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            if step is not None:
                step(f"{len(prompt.tokens)} tokens, depth {prompt.depth:g}")
    return answers
