"""Measure the tiny model inside and past its window, and whether clipped positions repair it.

This module uses plain transformers without posenc. The repair is a dense ReRoPE (relative
positions clipped at a constant), the simplest remapping there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from training.texts import Text

# Shapes: B batch, H heads, L length, D head dim.

LENGTHS = (256, 512, 1024, 2048)
CLIP = 96
_DOCUMENTS, _SCORED = 32, 128
_TOKENS_AT_ONCE, _QUERIES = 4096, 128
_SPAN, _HINT, _SPANS = 12, 3, 64
_SEED = 7
_RETRIEVAL_DISTANCES = {
    256: ((12, 50), (50, 100), (100, 150), (150, 200), (200, 244)),
    512: ((256, 500),),
    1024: ((512, 1012),),
    2048: ((1024, 2036),),
}


def evaluate(folder: Path, texts: list[Text]) -> dict[str, Any]:
    """Measure perplexity and retrieval on held-out texts, with native and with clipped positions.

    Parameters
    ----------
    folder
        The exported model.
    texts
        Texts the model was not trained on.

    Returns
    -------
    dict
        Per text and variant: perplexity by input length, retrieval by input length and distance.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    random_ids = np.setdiff1d(np.arange(model.config.vocab_size), tokenizer.all_special_ids)
    results: dict[str, Any] = {"settings": _settings()}
    for text in texts:
        tokens = np.array(tokenizer("\n".join(text.documents), add_special_tokens=False)["input_ids"])
        results[text.name] = {"tokens": len(tokens), "native": _measure(model, tokens, random_ids)}
        with clipped_positions(model, CLIP):
            results[text.name][f"rerope_{CLIP}"] = _measure(model, tokens, random_ids)
        print(text.name, results[text.name], flush=True)
    return results


def perplexity(model: Any, tokens: NDArray[np.int64], length: int) -> float:
    """Return the perplexity of the last 128 tokens of inputs of `length` tokens.

    The scored tokens are the same for every length; only the amount of text before them differs.
    """
    ends = np.linspace(max(LENGTHS), len(tokens), _DOCUMENTS).astype(int)
    inputs = torch.from_numpy(np.stack([tokens[end - length : end] for end in ends]))
    losses = []
    for part in torch.split(inputs, max(1, _TOKENS_AT_ONCE // length)):
        logits = _logits(model, part, _SCORED + 1)[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, -_SCORED:].flatten()))
    return math.exp(float(torch.stack(losses).mean()))


def retrieval(
    model: Any, tokens: NDArray[np.int64], random_ids: NDArray[np.int64], length: int, distances: tuple[int, int]
) -> float:
    """Return the share of a random span that the model copies when the span occurs again.

    Inputs of `length` tokens end with a span of 12 random tokens. The same span was planted earlier,
    at a distance in `distances`. The measure is the share of the span's tokens, after the first
    three, that are the model's first guess.
    """
    rng = np.random.default_rng([_SEED, length, *distances])
    samples = []
    for start in np.linspace(0, len(tokens) - length, _SPANS).astype(int):
        sample = tokens[start : start + length].copy()
        first = length - _SPAN - int(rng.integers(distances[0], distances[1] + 1))
        span = rng.choice(random_ids, _SPAN)
        sample[first : first + _SPAN] = sample[-_SPAN:] = span
        samples.append(sample)
    hits = []
    for part in torch.split(torch.from_numpy(np.stack(samples)), max(1, _TOKENS_AT_ONCE // length)):
        guesses = _logits(model, part, _SPAN + 1)[:, _HINT:-1].argmax(-1)
        hits.append((guesses == part[:, _HINT - _SPAN :]).float().mean())
    return float(torch.stack(hits).mean())


@contextmanager
def clipped_positions(model: Any, clip: int) -> Iterator[None]:
    """Make `model` attend as if no token were farther away than `clip`: ReRoPE, computed densely."""
    rotary, before = model.model.rotary_emb, model.config._attn_implementation

    def unrotated(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    def rotate(x: Tensor, positions_L: Tensor) -> Tensor:
        angles_LD = torch.outer(positions_L.float(), rotary.inv_freq).repeat(1, 2)
        rotated: Tensor = apply_rotary_pos_emb(x, x, angles_LD.cos()[None], angles_LD.sin()[None])[0]
        return rotated

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, scaling: float, **rest: Any) -> Any:
        positions_L = torch.arange(q.shape[2])
        near_q, near_k = rotate(q, positions_L), rotate(k, positions_L)
        far_q = rotate(q, torch.full_like(positions_L, clip))
        groups = q.shape[1] // k.shape[1]
        near_k, k, v = (part.repeat_interleave(groups, dim=1) for part in (near_k, k, v))
        blocks = []
        # Queries run in blocks, because the allocator returns large score matrices to the system each time.
        for start in range(0, q.shape[2], _QUERIES):
            stop = min(start + _QUERIES, q.shape[2])
            distance_LL = positions_L[start:stop, None] - positions_L[None, :stop]
            near_BHLL = near_q[:, :, start:stop] @ near_k[:, :, :stop].mT
            far_BHLL = far_q[:, :, start:stop] @ k[:, :, :stop].mT
            scores_BHLL = torch.where(distance_LL < clip, near_BHLL, far_BHLL) * scaling
            scores_BHLL = scores_BHLL.masked_fill(distance_LL < 0, -torch.inf)
            blocks.append(scores_BHLL.softmax(-1) @ v[:, :, :stop])
        return torch.cat(blocks, dim=2).transpose(1, 2), None

    AttentionInterface.register("clipped_positions", attend)
    hook = rotary.register_forward_hook(unrotated)
    model.set_attn_implementation("clipped_positions")
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(before)


def _measure(model: Any, tokens: NDArray[np.int64], random_ids: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "perplexity": {str(length): round(perplexity(model, tokens, length), 3) for length in LENGTHS},
        "retrieval": {
            str(length): {
                f"{low}-{high}": round(retrieval(model, tokens, random_ids, length, (low, high)), 4)
                for low, high in buckets
            }
            for length, buckets in _RETRIEVAL_DISTANCES.items()
        },
    }


@torch.no_grad()
def _logits(model: Any, inputs: Tensor, last: int) -> Tensor:
    logits: Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=last).logits
    return logits


def _settings() -> dict[str, object]:
    return {
        "documents": _DOCUMENTS,
        "scored_tokens": _SCORED,
        "spans": _SPANS,
        "span_tokens": _SPAN,
        "hint_tokens": _HINT,
        "seed": _SEED,
    }
