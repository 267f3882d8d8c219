"""Texts, documents, perplexity and retrieval, on models whose answers are known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from posenc.errors import InvalidInputError
from posenc.evaluate.compare import SEED
from posenc.evaluate.perplexity import Mean, PerplexityScore, Retrieval
from posenc.evaluate.tasks.base import Source, Subject, over_documents
from posenc.evaluate.tasks.prose import check_lengths, document_losses
from posenc.evaluate.tasks.spans import DEPTHS, SPAN, SingleSpan, plant, random_tokens
from posenc.evaluate.texts import Text, cut_documents, read_text, tokenize

VOCABULARY = 50


class Model:
    """Answers by a rule: logits of the next token from all tokens so far. Records its inputs."""

    device = "cpu"

    def __init__(self, guess: Any, certainty: float = 30.0) -> None:
        self.guess, self.certainty, self.inputs = guess, certainty, []

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return self.forward(**inputs)

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int, past_key_values: None = None
    ) -> SimpleNamespace:
        assert past_key_values is None
        self.inputs.append(input_ids[0].numpy().copy())
        tokens = input_ids[0].tolist()
        logits = torch.zeros(1, logits_to_keep, VOCABULARY)
        for row, end in enumerate(range(len(tokens) - logits_to_keep + 1, len(tokens) + 1)):
            guess = self.guess(tokens[:end])
            if guess is not None:
                logits[0, row, guess] = self.certainty
        return SimpleNamespace(logits=logits, past_key_values=None)


def copies(seen: list[int]) -> int | None:
    """The token that followed the last three tokens where they occurred before: perfect induction."""
    for start in range(len(seen) - 4, -1, -1):
        if seen[start : start + 3] == seen[-3:]:
            return seen[start + 3]
    return None


class Handle:
    """Stands for the handle of a strategy."""

    prompt_length = staticmethod(nullcontext)


class Tokenizer:
    """Spans are drawn from tokens 40 to 49, prose from the others."""

    all_special_ids = tuple(range(40))

    def __len__(self) -> int:
        return VOCABULARY

    def encode(self, text: str, **options: Any) -> list[int]:
        return np.random.default_rng(3).integers(0, 40, 1200).tolist()


def measure_perplexity(model: Model, documents: np.ndarray, length: int, scored: int) -> PerplexityScore:
    return PerplexityScore(Mean(tuple(document_losses(model, documents, length, scored))))


def measure_retrieval(model: Model, length: int, documents: int = 10) -> Retrieval:
    task = SingleSpan(documents=documents, longest=120)
    subject = Subject(SimpleNamespace(model=model), Handle())  # type: ignore[arg-type]
    samples = list(task.measure(subject, Source(Tokenizer(), Text("prose", "")), length, SEED))
    return Retrieval(over_documents(samples), tuple(sample.depth for sample in samples if sample.depth is not None))


@pytest.fixture
def prose() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 40, (10, 120))


def test_the_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary_size(prose):
    measured = measure_perplexity(Model(lambda seen: None), prose, 64, 16)
    assert measured.value == pytest.approx(VOCABULARY)
    assert measured.standard_error == pytest.approx(0, abs=1e-4)


def test_the_perplexity_of_a_model_that_knows_the_text_is_one():
    documents = np.tile(np.arange(120) % VOCABULARY, (4, 1))
    assert measure_perplexity(
        Model(lambda seen: (seen[-1] + 1) % VOCABULARY), documents, 64, 16
    ).value == pytest.approx(1)


def test_only_the_last_tokens_count_and_every_length_reads_the_same_ones():
    documents = np.tile(np.arange(120) % VOCABULARY, (1, 1))
    right_at_the_end = Model(lambda seen: (seen[-1] + 1) % VOCABULARY if len(seen) >= 48 else 0)
    assert measure_perplexity(right_at_the_end, documents, 64, 16).value == pytest.approx(1)
    assert measure_perplexity(right_at_the_end, documents, 64, 17).value > 1.5
    for length in (32, 64):
        measure_perplexity(right_at_the_end, documents, length, 16)
        assert (right_at_the_end.inputs[-1] == documents[0, -length:]).all()


def test_a_nan_stays_in_its_document(prose):
    spoilt = iter([math.nan, 30.0, 30.0])

    class Sometimes(Model):
        def __call__(self, **kwargs: Any) -> SimpleNamespace:
            self.certainty = next(spoilt)
            return super().__call__(**kwargs)

    losses = measure_perplexity(Sometimes(lambda seen: 0), prose[:3], 32, 8).losses.values
    assert math.isnan(losses[0])
    assert all(math.isfinite(loss) for loss in losses[1:])


def test_the_standard_error_is_the_textbook_one():
    mean = Mean((1.0, 2.0, 4.0, 5.0))
    assert mean.mean == 3.0
    assert mean.standard_error == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4))
    assert math.isnan(Mean((1.0,)).standard_error)
    score = PerplexityScore(mean)
    assert score.standard_error == pytest.approx(math.exp(3) * mean.standard_error)
    assert PerplexityScore(Mean((1e4, 1e4))).value == math.inf


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


def test_a_model_that_copies_retrieves_everything_at_every_depth():
    measured = measure_retrieval(Model(copies), 100)
    assert measured.scores.mean == 1.0
    assert sorted(set(measured.depths)) == sorted(DEPTHS)
    assert measured.at(0.5).values == (1.0, 1.0)


def test_a_model_that_forgets_retrieves_only_what_is_near():
    def forgetful(seen: list[int]) -> int | None:
        return copies(seen[-60:])

    measured = measure_retrieval(Model(forgetful), 120)
    # Spans start at depth * 96, so those at 0.7 and 0.9 are within the last 60 tokens.
    by_depth = measured.as_dict()["by_depth"]
    assert by_depth["0.9"] == 1.0
    assert max(by_depth["0.1"], by_depth["0.3"]) < 0.3


def test_a_guesser_retrieves_nothing():
    assert measure_retrieval(Model(lambda seen: 0), 100).scores.mean == 0.0


def test_every_length_has_the_same_spans():
    model = Model(copies)
    for length in (60, 120):
        measure_retrieval(model, length, documents=1)
    assert (model.inputs[0][-12:] == model.inputs[1][-12:]).all()


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_planting_keeps_the_length_and_the_rest(depth: float):
    document, span = np.arange(100, 200), np.arange(12)
    (start,) = SingleSpan().places(100, [depth])
    assert start == int(depth * 76)
    (planted,) = plant(document, [span], [start])
    assert (planted[start : start + 12] == span).all()
    assert (planted[-12:] == span).all()
    kept = np.r_[0:start, start + 12 : 88]
    assert (planted[kept] == document[kept]).all()
    assert (document == np.arange(100, 200)).all()


def test_planting_into_too_short_a_document_is_refused():
    task = SingleSpan()
    assert task.places(2 * SPAN, [0.5]) == [0]
    with pytest.raises(InvalidInputError, match=r"23 tokens have no room for spans of 12 tokens at depths 0\.5"):
        task.places(23, [0.5])


def test_the_built_in_text_is_long_and_the_same_every_time():
    text = read_text()
    assert text.name == "pydoc_data.topics"
    assert len(text.content) > 300_000
    assert read_text("pydoc") == text


def test_special_tokens_are_never_planted():
    class Six:
        all_special_ids = (0, 3)

        def __len__(self) -> int:
            return 6

    assert random_tokens(Six()).tolist() == [1, 2, 4, 5]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InvalidInputError, match="the text is empty"):
        tokenize(SimpleNamespace(encode=lambda text, **kwargs: []), Text("t", ""))
