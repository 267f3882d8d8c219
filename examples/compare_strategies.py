"""Perplexity at the end of one text, with more and more preceding text, under several strategies.

One text is not a measurement: `posenc ppl` uses many documents and reports standard errors.

    python examples/compare_strategies.py
"""

from __future__ import annotations

import pydoc_data.topics

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import posenc

FOLDER = "posenc/models/tiny"
LENGTHS = (256, 512, 1024)
SCORED = 128
STRATEGIES = {
    "rope": {},
    "yarn": {"factor": 8},
    "self_extend": {"group": 12, "window_size": 64},
    "lampe": {"mapping": 128, "head": 64},
    "rerope": {"window_size": 96},
}


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the perplexity of the last tokens of a text, given all tokens before them."""
    logits = model(ids[None], logits_to_keep=SCORED + 1).logits[0, :-1]
    return float(F.cross_entropy(logits, ids[-SCORED:]).exp())


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "\n".join(pydoc_data.topics.topics.values())[:20_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    end = max(LENGTHS)
    print("strategy".ljust(14), *(f"{length:>8}" for length in LENGTHS))
    for name, params in STRATEGIES.items():
        with posenc.apply(model, name, **params):
            found = [perplexity(model, ids[end - length : end]) for length in LENGTHS]
        print(name.ljust(14), *(f"{value:8.2f}" for value in found))


if __name__ == "__main__":
    main()
