"""Apply a strategy, generate far beyond the window, look at the plan and remove it again.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import posenc

FOLDER = "posenc/models/tiny"  # any causal language model with rotary positions; this one has a window of 256 tokens


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer("The quick brown fox jumps over the lazy dog. " * 60, return_tensors="pt", verbose=False)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        before = model(**inputs).logits

    with posenc.apply(model, "rerope", window_size=96) as handle:
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        print(f"{length} tokens, then: {tokenizer.decode(tokens[0, length:])!r}")
        print(handle.plan(length).explain())

    with torch.no_grad():
        print("restored bit for bit:", torch.equal(model(**inputs).logits, before))


if __name__ == "__main__":
    main()
