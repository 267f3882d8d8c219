"""A needle in a haystack: the model continues a span of random tokens, planted far back, when its beginning recurs.

python examples/needle.py
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import posenc

FOLDER = "posenc/models/tiny"
LENGTH, NEEDLES, SPAN, CUE = 1024, 6, 12, 3


@torch.no_grad()
def found(model: torch.nn.Module, hay: torch.Tensor, depth: float, seed: int) -> float:
    """Return the share of the needle's tokens after its beginning that are the model's first guess."""
    needle = torch.randint(100, 400, (SPAN,), generator=torch.Generator().manual_seed(seed))
    at = int(depth * (LENGTH - 2 * SPAN))
    text = torch.cat((hay[:at], needle, hay[at : LENGTH - 2 * SPAN], needle))
    guesses = model(text[None], logits_to_keep=SPAN - CUE + 1).logits[0, :-1].argmax(-1)
    return float((guesses == needle[CUE:]).float().mean())


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "\n".join(pydoc_data.topics.topics.values())[:20_000]
    hay = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    for name, params in {"rope": {}, "rerope": {"window_size": 96}}.items():
        with posenc.apply(model, name, **params):
            shares = [found(model, hay, depth=number / NEEDLES, seed=number) for number in range(NEEDLES)]
        print(f"{name}: {sum(shares) / NEEDLES:.0%} of {NEEDLES} needles in {LENGTH} tokens")


if __name__ == "__main__":
    main()
