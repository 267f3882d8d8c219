"""A batch whose rows ended at different lengths continues with another turn: padding after an end is hidden."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

import posenc
from tests.hf import tiny

TOLERANCE = 1e-4
WIDTH, NEW, TURN, END = 76, 9, 8, tiny.VOCAB - 1
LENGTHS = (76, 50)
STRATEGIES: dict[str, dict[str, Any]] = {
    "rope": {},
    "lampe": tiny.LAMPE,
    "rerope": {"window_size": 12},
    "self_extend": {"group": 4, "window_size": 16},
    "streaming_llm": {"window_size": 30, "sinks": 4},
}


class Turn(NamedTuple):
    """The state of a batch after ``generate``, and the mask of its real tokens."""

    sequences: Tensor
    mask: Tensor
    cache: Any


class Ending:
    """Makes the end token the third token of one row, and forbids it everywhere else."""

    def __init__(self, row: int) -> None:
        self.row = row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, END] = -torch.inf
        if input_ids.shape[1] == WIDTH + 2:
            scores[self.row] = torch.arange(scores.shape[1]) == END
        return scores


def first_turn(model: Any, ended: int) -> Turn:
    """Generate greedily; row ``ended`` stops at its third token and is padded from then on."""
    ids, mask = tiny.tokens(2, WIDTH), torch.ones(2, WIDTH + NEW, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, : WIDTH - length] = 0
    out = model.generate(
        ids * mask[:, :WIDTH],
        attention_mask=mask[:, :WIDTH],
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=END,
        logits_processor=LogitsProcessorList([Ending(ended)]),
        return_dict_in_generate=True,
    )
    assert out.sequences[ended, WIDTH + 2 :].tolist() == [END] + [0] * (NEW - 3)
    mask[ended, WIDTH + 3 :] = 0
    return Turn(out.sequences, mask, out.past_key_values)


def second_turn(model: Any, turn: Turn) -> Tensor:
    """Return logits [2, TURN, vocab] of the next turn, and of a decoded token."""
    ids = torch.cat((turn.sequences, tiny.tokens(2, TURN + 1, seed=7)), 1)
    mask = torch.cat((turn.mask, torch.ones(2, TURN + 1, dtype=torch.long)), 1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    past, total = int(turn.cache.get_seq_length()), ids.shape[1]
    with torch.no_grad():
        parts = [
            model(
                ids[:, low:high],
                attention_mask=mask[:, :high],
                position_ids=position_ids[:, low:high],
                past_key_values=turn.cache,
            ).logits
            for low, high in ((past, total - 1), (total - 1, total))
        ]
    return torch.cat(parts, 1)[:, -TURN - 1 :]


def alone(model: Any, turn: Turn, row: int) -> Tensor:
    """Run the same forwards with the real tokens of one row only."""
    past = int(turn.cache.get_seq_length())
    ids = torch.cat((turn.sequences, tiny.tokens(2, TURN + 1, seed=7)), 1)[row]
    mask = torch.cat((turn.mask, torch.ones(2, TURN + 1, dtype=torch.long)), 1)[row].bool()
    cache, logits = DynamicCache(config=model.config), torch.empty(0)
    cuts = [0, WIDTH, *range(WIDTH + 1, past + 1), len(ids) - 1, len(ids)]
    parts = []
    with torch.no_grad():
        for low, high in pairwise(cuts):
            real = ids[low:high][mask[low:high]]
            if len(real):
                logits = model(real[None], past_key_values=cache).logits
                parts.append(logits)
    return torch.cat(parts, 1)[0, -TURN - 1 :]


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_row_continues_as_it_does_alone(family: str, name: str, ended: int) -> None:
    model = tiny.make(family)
    with posenc.apply(model, name, **STRATEGIES[name]):
        turn = first_turn(model, ended)
        expected = [alone(model, turn, row) for row in range(2)]
        got = second_turn(model, turn)
    for row in range(2):
        assert (got[row] - expected[row]).abs().max() < TOLERANCE, row


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("ended", [0, 1])
def test_the_identity_continues_like_stock(family: str, ended: int) -> None:
    model = tiny.make(family)
    stock = second_turn(model, first_turn(model, ended))
    with posenc.apply(model, "rope"):
        assert torch.equal(second_turn(model, first_turn(model, ended)), stock)


@pytest.mark.parametrize("ended", [0, 1])
def test_generate_continues_every_row_as_alone(ended: int) -> None:
    model = tiny.make("llama")
    with posenc.apply(model, "lampe", **STRATEGIES["lampe"]):
        turn = first_turn(model, ended)
        ids = torch.cat((turn.sequences, tiny.tokens(2, TURN + 1, seed=7)[:, :TURN]), 1)
        mask = torch.cat((turn.mask, torch.ones(2, TURN, dtype=torch.long)), 1)
        first = [alone(model, turn, row)[-2] for row in range(2)]
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=turn.cache,
            do_sample=False,
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for row in range(2):
        assert (out.logits[0][row] - first[row]).abs().max() < TOLERANCE, row


def test_a_mask_that_hides_real_tokens_of_the_past_is_refused() -> None:
    """Tokens that others attended cannot be hidden; only those at a row's end can, which no later token saw."""
    model = tiny.make("llama")
    with posenc.apply(model, "lampe", **STRATEGIES["lampe"]):
        turn = first_turn(model, 1)
        turn.mask[0, WIDTH - 5] = 0
        with pytest.raises(posenc.PosencError):
            second_turn(model, turn)
