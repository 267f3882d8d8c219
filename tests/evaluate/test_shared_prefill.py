"""The common beginning of prompts is read once, and each is answered as if it had been read alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import posenc
from posenc.errors import InvalidInputError
from posenc.evaluate.models import TINY, Loaded, load
from posenc.evaluate.shared_prefill import SharedPrefill
from posenc.evaluate.texts import read_text, tokenize

STRATEGIES: dict[str, dict[str, Any]] = {
    "rope": {},
    "lampe": {"mapping": 128, "head": 64},
    "rerope": {"window_size": 96},
    "self_extend": {"group": 4, "window_size": 64},
    "dca": {},
    "string": {},
    "streaming_llm": {},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4},
}
LENGTH = 520


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load(TINY)


@pytest.fixture(scope="module")
def prompts(tiny: Loaded) -> list[np.ndarray]:
    """Prompts of one length: each equals the one before in its first 500 tokens, its first 100, or all of them."""
    tokens = tokenize(tiny.tokenizer, read_text())
    first = tokens[:LENGTH]
    late, early = first.copy(), first.copy()
    late[500:] = tokens[1000:1020]
    early[100:] = tokens[2000 : 2000 + LENGTH - 100]
    return [first, late, early, early]


@pytest.mark.parametrize("name", STRATEGIES)
def test_logits_are_those_of_the_whole_prompt(name: str, tiny: Loaded, prompts: list[np.ndarray]):
    with posenc.apply(tiny.model, name, **STRATEGIES[name]) as handle:
        reader = SharedPrefill(tiny.model, handle)
        for prompt in prompts:
            logits = reader.read(prompt, 8)
            with torch.inference_mode():
                whole = tiny.model(torch.from_numpy(prompt)[None], use_cache=False, logits_to_keep=8).logits[0]
            assert torch.allclose(logits, whole, atol=2e-4), float((logits - whole).abs().max())
    assert reader.tokens_read == LENGTH + 20 + (LENGTH - 100) + 8


@pytest.mark.parametrize("name", ["rope", "lampe", "dynamic"])
def test_answers_are_those_of_generate(name: str, tiny: Loaded, prompts: list[np.ndarray]):
    with posenc.apply(tiny.model, name, **STRATEGIES[name]) as handle:
        reader = SharedPrefill(tiny.model, handle)
        for prompt in prompts[:3]:
            tokens = torch.from_numpy(prompt)[None]
            out = tiny.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=1
            )
            expected = [token for token in out[0, LENGTH:].tolist() if token != tiny.model.config.eos_token_id]
            assert reader.answer(prompt, 12) == expected


def test_an_answer_ends_at_the_end_token(tiny: Loaded, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch):
    with posenc.apply(tiny.model, "rope") as handle:
        reader = SharedPrefill(tiny.model, handle)
        said = reader.answer(prompts[0], 6)
        monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [said[3]])
        assert reader.answer(prompts[0], 6) == said[: said.index(said[3])]


def test_another_length_shares_nothing(tiny: Loaded, prompts: list[np.ndarray]):
    with posenc.apply(tiny.model, "lampe", **STRATEGIES["lampe"]) as handle:
        reader = SharedPrefill(tiny.model, handle)
        reader.read(prompts[0])
        reader.read(prompts[0][:-1])
    assert reader.tokens_read == 2 * LENGTH - 1


@pytest.mark.parametrize("keep", [0, LENGTH + 1])
def test_an_impossible_number_of_logits_is_refused(keep: int, tiny: Loaded, prompts: list[np.ndarray]):
    with posenc.apply(tiny.model, "rope") as handle, pytest.raises(InvalidInputError, match="keep"):
        SharedPrefill(tiny.model, handle).read(prompts[0], keep)
