"""The passkey task in words, for real language models: remember a number across a long text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.evaluate.models import pad_token

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class Passkey:
    """One prompt of exactly the length asked for, and the number it hides."""

    tokens: NDArray[np.int64]
    key: str
    depth: float


def make_passkey(tokenizer: Any, haystack: NDArray[np.int64], length: int, depth: float, *, seed: int = 0) -> Passkey:
    """Hide a random number at `depth` of a prompt of `length` tokens that ends with the question.

    Raises
    ------
    InvalidInputError
        If the length has no room for the sentences, or the haystack is too short to fill it.
    """
    if not 0 <= depth <= 1:
        raise InvalidInputError(f"depth: must lie between 0 and 1, got {depth}.")
    if length < 1:
        raise InvalidInputError(f"length {length}: must be at least 1 token.")
    rng = np.random.default_rng([seed, length, round(depth * 1000)])
    key = "".join(str(digit) for digit in rng.integers(1, 10, DIGITS))
    needle, question = (
        np.asarray(tokenizer.encode(text.format(key=key), add_special_tokens=False), dtype=np.int64)
        for text in (NEEDLE, QUESTION)
    )
    room = length - len(needle) - len(question)
    if room < 1:
        raise InvalidInputError(f"length {length}: too short for a passkey prompt, give at least {length - room + 1}.")
    if len(haystack) < room:
        raise InvalidInputError(f"the haystack has {len(haystack)} tokens, too short for a prompt of {length}.")
    offset = int(rng.integers(0, len(haystack) - room + 1))
    prose = haystack[offset : offset + room]
    cut = int(depth * room)
    return Passkey(np.concatenate([prose[:cut], needle, prose[cut:], question]), key, depth)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: Passkey, *, new_tokens: int = 2 * DIGITS) -> str:
    """What the model says, greedily."""
    tokens = torch.from_numpy(prompt.tokens)[None].to(model.device)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pad_token(model),
    )
    said: str = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
    return said


def score(said: str, key: str) -> float:
    """Share of the key's digits that the answer starts with; 1.0 when it names the key."""
    digits = [character for character in said if character.isdigit()][: len(key)]
    right = 0
    for given, wanted in zip(digits, key, strict=False):
        if given != wanted:
            break
        right += 1
    return right / len(key)


def table(results: Sequence[tuple[int, float]]) -> dict[int, tuple[int, int]]:
    """Per length: how many prompts were answered with the whole key, and how many there were."""
    lengths = sorted({length for length, _ in results})
    return {
        length: (sum(s == 1.0 for at, s in results if at == length), sum(at == length for at, _ in results))
        for length in lengths
    }
