"""Texts, documents, perplexity and retrieval, on models whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from posenc.errors import InvalidInputError
from posenc.evaluate import perplexity, retrieval
from posenc.evaluate.perplexity import Mean, Perplexity, check_lengths
from posenc.evaluate.texts import Text, cut_documents, read_text, tokenize

VOCABULARY = 50


class Model:
    """Answers by a rule: logits of the next token from all tokens so far. Records the inputs it was given."""

    device = "cpu"

    def __init__(self, guess: Any, certainty: float = 30.0) -> None:
        self.guess, self.certainty, self.asked = guess, certainty, []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert use_cache is False, "logits_to_keep with a cache cannot be trusted"
        self.asked.append(input_ids[0].numpy().copy())
        tokens = input_ids[0].tolist()
        logits = torch.zeros(1, logits_to_keep, VOCABULARY)
        for row, end in enumerate(range(len(tokens) - logits_to_keep + 1, len(tokens) + 1)):
            guess = self.guess(tokens[:end])
            if guess is not None:
                logits[0, row, guess] = self.certainty
        return SimpleNamespace(logits=logits)


def copies(seen: list[int]) -> int | None:
    """The token that followed the last three tokens where they occurred before: perfect induction."""
    for start in range(len(seen) - 4, -1, -1):
        if seen[start : start + 3] == seen[-3:]:
            return seen[start + 3]
    return None


@pytest.fixture
def prose() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 40, (10, 120))


def test_the_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary_size(prose):
    measured = perplexity.measure(Model(lambda seen: None), prose, 64, 16)
    assert measured.value == pytest.approx(VOCABULARY)
    assert measured.standard_error == pytest.approx(0, abs=1e-4)


def test_the_perplexity_of_a_model_that_knows_the_text_is_one():
    documents = np.tile(np.arange(120) % VOCABULARY, (4, 1))
    assert perplexity.measure(
        Model(lambda seen: (seen[-1] + 1) % VOCABULARY), documents, 64, 16
    ).value == pytest.approx(1)


def test_only_the_last_tokens_count_and_every_length_reads_the_same_ones():
    documents = np.tile(np.arange(120) % VOCABULARY, (1, 1))
    right_at_the_end = Model(lambda seen: (seen[-1] + 1) % VOCABULARY if len(seen) >= 48 else 0)
    assert perplexity.measure(right_at_the_end, documents, 64, 16).value == pytest.approx(1)
    assert perplexity.measure(right_at_the_end, documents, 64, 17).value > 1.5
    for length in (32, 64):
        perplexity.measure(right_at_the_end, documents, length, 16)
        assert (right_at_the_end.asked[-1] == documents[0, -length:]).all()


def test_a_nan_stays_in_its_document(prose):
    spoilt = iter([math.nan, 30.0, 30.0])

    class Sometimes(Model):
        def __call__(self, **kwargs: Any) -> SimpleNamespace:
            self.certainty = next(spoilt)
            return super().__call__(**kwargs)

    losses = perplexity.measure(Sometimes(lambda seen: 0), prose[:3], 32, 8).losses.values
    assert math.isnan(losses[0])
    assert all(math.isfinite(loss) for loss in losses[1:])


def test_the_standard_error_is_the_textbook_one():
    mean = Mean((1.0, 2.0, 4.0, 5.0))
    assert mean.mean == 3.0
    assert mean.standard_error == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4))
    assert math.isnan(Mean((1.0,)).standard_error)
    score = Perplexity(mean)
    assert score.standard_error == pytest.approx(math.exp(3) * mean.standard_error)
    assert Perplexity(Mean((1e4, 1e4))).value == math.inf


def test_differences_are_paired_by_document():
    assert Mean((3.0, 5.0)).minus(Mean((1.0, 1.5))).values == (2.0, 3.5)


@pytest.mark.parametrize(
    ("lengths", "scored", "said"),
    [
        ([], 8, "at least one"),
        ([64], 0, "score"),
        ([64, 8], 8, "length 8"),
        ([0], 1, "length 0"),
        ([-5], 1, "length -5"),
    ],
)
def test_lengths_out_of_range_are_refused(lengths, scored, said):
    with pytest.raises(InvalidInputError, match=said):
        check_lengths(lengths, scored)


def test_documents_do_not_overlap_in_a_long_text():
    documents = cut_documents(np.arange(1000), 90, 10, step=10, name="t")
    assert documents.shape == (10, 90)
    assert (np.diff(documents, axis=1) == 1).all()
    assert (documents[1:, 0] > documents[:-1, -1]).all()
    assert documents[-1, -1] == 999


def test_scored_tokens_never_overlap():
    documents = cut_documents(np.arange(130), 100, 50, step=10, name="t")
    assert len(documents) == 4
    assert (np.diff(documents[:, -1]) >= 10).all()
    assert len(cut_documents(np.arange(100), 100, 5, step=10, name="t")) == 1


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(InvalidInputError, match="story: the text has 99 tokens, too short for an input of 100"):
        cut_documents(np.arange(99), 100, 5, step=10, name="story")


def test_a_model_that_copies_retrieves_everything_at_every_depth(prose):
    measured = retrieval.measure(Model(copies), prose, 100, np.arange(40, 50))
    assert measured.scores.mean == 1.0
    assert sorted(set(measured.depths)) == sorted(retrieval.DEPTHS)
    assert measured.at(0.5).values == (1.0, 1.0)


def test_a_model_that_forgets_retrieves_only_what_is_near(prose):
    def forgetful(seen: list[int]) -> int | None:
        return copies(seen[-60:])

    measured = retrieval.measure(Model(forgetful), prose, 120, np.arange(40, 50))
    # Spans start at depth * 96, so those at 0.7 and 0.9 are within the last 60 tokens.
    by_depth = measured.as_dict()["by_depth"]
    assert by_depth["0.9"] == 1.0
    assert max(by_depth["0.1"], by_depth["0.3"]) < 0.3


def test_a_guesser_retrieves_nothing(prose):
    assert retrieval.measure(Model(lambda seen: 0), prose, 100, np.arange(40, 50)).scores.mean == 0.0


def test_every_length_has_the_same_spans(prose):
    model = Model(copies)
    for length in (60, 120):
        retrieval.measure(model, prose[:1], length, np.arange(40, 50))
    assert (model.asked[0][-12:] == model.asked[1][-12:]).all()


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_planting_keeps_the_length_and_the_rest(depth):
    document, span = np.arange(100, 200), np.arange(12)
    planted = retrieval.plant(document, span, depth)
    start = int(depth * 76)
    assert (planted[start : start + 12] == span).all()
    assert (planted[-12:] == span).all()
    kept = np.r_[0:start, start + 12 : 88]
    assert (planted[kept] == document[kept]).all()
    assert (document == np.arange(100, 200)).all()


def test_planting_into_too_short_a_document_is_refused():
    with pytest.raises(InvalidInputError, match="too short to plant"):
        retrieval.plant(np.arange(23), np.arange(12), 0.5)
    with pytest.raises(InvalidInputError, match="hint"):
        retrieval.plant(np.arange(100), np.arange(12), 0.5, hint=12)


def test_the_built_in_text_is_long_and_the_same_every_time():
    text = read_text()
    assert text.name == "pydoc_data.topics"
    assert len(text.content) > 300_000
    assert read_text("pydoc") == text


def test_special_tokens_are_never_planted():
    tokenizer = SimpleNamespace(all_special_ids=[0, 3], __len__=None)

    class Tokenizer:
        all_special_ids = tokenizer.all_special_ids

        def __len__(self) -> int:
            return 6

    assert retrieval.random_tokens(Tokenizer()).tolist() == [1, 2, 4, 5]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InvalidInputError, match="the text is empty"):
        tokenize(SimpleNamespace(encode=lambda text, **kwargs: []), Text("t", ""))
