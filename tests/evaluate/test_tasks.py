"""Every task makes the prompts it describes, at the requested size, and scores answers by its own rule."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import posenc
from posenc.errors import InvalidConfigError, InvalidInputError, UnknownNameError
from posenc.evaluate.models import TINY, load
from posenc.evaluate.shared_prefill import SharedPrefill
from posenc.evaluate.tasks import read_task
from posenc.evaluate.tasks.base import Sample, Source, Subject, over_documents
from posenc.evaluate.tasks.prose import document_losses
from posenc.evaluate.tasks.questions import Question, QuestionTask
from posenc.evaluate.texts import Text, read_text
from posenc.plugins import tasks


class Characters:
    """A tokenizer whose tokens are characters."""

    all_special_ids: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return 128

    def encode(self, text: str, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, tokens))


SOURCE = Source(Characters(), Text("dots", "." * 30_000))
SETTINGS: dict[str, dict[str, Any]] = {"common_words": {"common": 4, "often": 12, "seldom": 2}}
QUESTIONS = sorted(name for name, info in tasks().items() if issubclass(info.factory, QuestionTask))


def ask(kind: str, length: int, seed: int = 0, **settings: Any) -> tuple[QuestionTask, list[Question]]:
    task = read_task({"task": kind, **SETTINGS.get(kind, {}), **settings}, source="t")
    assert isinstance(task, QuestionTask)
    task.check(SOURCE, length, seed)
    return task, task.questions(SOURCE, length, np.random.default_rng([seed, 0]))


def text_of(question: Question) -> str:
    return Characters().decode(question.prompt)


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize("length", [2000, 4001])
def test_prompts_have_the_requested_size_and_contain_the_answers(kind: str, length: int):
    _, questions = ask(kind, length)
    for question in questions:
        text = text_of(question)
        slack = 120 if kind in ("common_words", "frequent_words") else 0
        assert length - slack <= len(text) <= length
        assert question.references
        assert all(reference.text in text for reference in question.references)
        assert question.new_tokens > sum(len(reference.text) for reference in question.references)
    assert len({len(question.prompt) for question in questions}) == 1


@pytest.mark.parametrize("kind", QUESTIONS)
def test_prompts_are_determined_by_the_seed(kind: str):
    first, again, other = (ask(kind, 2500, seed)[1] for seed in (0, 0, 1))
    assert [text_of(question) for question in first] == [text_of(question) for question in again]
    assert text_of(first[0]) != text_of(other[0])


@pytest.mark.parametrize(
    "kind", ["passkey", "needle_single", "needle_multikey", "needle_multivalue", "needle_multiquery"]
)
def test_needles_are_at_their_depth(kind: str):
    for question in ask(kind, 8000)[1]:
        text = text_of(question)
        for reference in question.references:
            depth = text.index(reference.text) / len(text)
            assert depth == pytest.approx(reference.depth, abs=0.06)


def test_all_depths_share_one_haystack():
    questions = ask("passkey", 3000, depths=[0.2, 0.8, 0.5])[1]
    assert [question.references[0].depth for question in questions] == [0.2, 0.8, 0.5]
    shared = min(len(text_of(question)) for question in questions) - 200
    assert len({text_of(question)[:shared] for question in questions}) == 1


def test_a_moving_needle_changes_nothing_before_it():
    deep, shallow = ask("needle_single", 5000, depths=[0.3, 0.9])[1]
    assert deep.references[0].depth == 0.9
    assert text_of(deep)[:1400] == text_of(shallow)[:1400]
    assert deep.references[0].text == shallow.references[0].text


def test_distractors_have_other_keys_and_values():
    (question,) = ask("needle_multikey", 5000, keys=4, depths=[0.5])[1]
    needles = re.findall(r"secret numbers of (\S+) is: (\d+)\.", text_of(question))
    assert len({key for key, _ in needles}) == len({value for _, value in needles}) == 4
    key = re.search(r"What is the secret number of (\S+) in", text_of(question))
    assert key is not None
    assert dict(needles)[key[1]] == question.references[0].text


def test_the_answers_are_all_values_of_one_key_or_those_of_all_keys():
    (values,) = ask("needle_multivalue", 5000, values=3)[1]
    needles = re.findall(r"numbers of (\S+) is: (\d+)\.", text_of(values))
    assert len({key for key, _ in needles}) == 1
    assert [reference.text for reference in values.references] == [value for _, value in needles]
    (keys,) = ask("needle_multiquery", 5000, keys=3)[1]
    needles = re.findall(r"numbers of (\S+) is: (\d+)\.", text_of(keys))
    assert len({key for key, _ in needles}) == 3
    assert {reference.text for reference in keys.references} == {value for _, value in needles}


def test_a_chain_of_variables_leads_to_the_value():
    (question,) = ask("variable_tracking", 6000, chains=2, hops=3)[1]
    text = text_of(question)
    value = re.search(r"have the value (\d+), directly", text)
    assert value is not None
    names = {value[1]}
    for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):  # in the order of the text
        if right in names:
            names.add(name)
    assert names - {value[1]} == {reference.text for reference in question.references}
    assert len(question.references) == 4
    assert len(re.findall("VAR", text)) == 2 * 4 + 2 * 3


def test_common_words_are_the_most_common_ones():
    (question,) = ask("common_words", 3000)[1]
    counts = Counter(re.findall(r"\n\d+\. (\w+)", text_of(question)))
    common = {reference.text for reference in question.references}
    assert {word for word, count in counts.items() if count == 12} == common
    assert {count for word, count in counts.items() if word not in common} == {2}
    assert len(counts) > 20


def test_frequent_words_are_the_most_frequent_after_the_noise():
    (question,) = ask("frequent_words", 4000)[1]
    body = text_of(question).split("\n")[1]
    counts = [word for word, _ in Counter(body.split()).most_common(5)]
    assert counts[0] == "...."
    assert counts[1:4] == [reference.text for reference in question.references]


class Oracle:
    """Stands for a model whose answers are computed from the references by a rule."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, []

    def install(self, task: QuestionTask, monkeypatch: pytest.MonkeyPatch, length: int) -> list[Sample]:
        by_prompt = {}
        for document in range(task.documents):
            for question in task.questions(SOURCE, length, task.random(length, 0, document)):
                by_prompt[question.prompt.tobytes()] = question

        def answer(reader: Any, prompt: np.ndarray, new_tokens: int) -> list[int]:
            said = self.rule([reference.text for reference in by_prompt[prompt.tobytes()].references])
            return [ord(character) for character in said][:new_tokens]

        monkeypatch.setattr(SharedPrefill, "answer", answer)
        return list(task.measure(SimpleNamespace(loaded=SimpleNamespace(model=None), handle=None), SOURCE, length, 0))


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize(
    ("rule", "score"),
    [
        (lambda references: " " + ", ".join(references).upper() + ".", 1.0),
        (lambda references: "no idea", 0.0),
        (lambda references: " " + ", ".join(references[: len(references) // 2]), None),
    ],
)
def test_answers_are_scored_per_reference(kind: str, rule: Any, score: float | None, monkeypatch: pytest.MonkeyPatch):
    task, questions = ask(kind, 2500)
    task = task.model_copy(update={"documents": 2})
    samples = Oracle(rule).install(task, monkeypatch, 2500)
    assert {sample.document for sample in samples} == {0, 1}
    count = len(questions[0].references)
    expected = (count // 2) / count if score is None else score
    assert over_documents(samples).values == pytest.approx((expected, expected))


@pytest.mark.parametrize("kind", sorted(tasks()))
def test_too_short_a_length_and_too_short_a_text_are_refused(kind: str):
    task = read_task({"task": kind}, source="t").fitted([20])
    with pytest.raises(InvalidInputError, match=r"\d+"):
        task.check(SOURCE, 20, 0)
    if kind not in ("common_words", "frequent_words"):
        with pytest.raises(InvalidInputError, match="has 30000 tokens"):
            task.fitted([40_000]).check(SOURCE, 40_000, 0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"task": "passkey", "depth": 0.5}, "passkey|depth: no such key"),
        ({"task": "passkey", "depths": [0.5, 0.5]}, "depth comes twice"),
        ({"task": "passkey", "depths": [1.5]}, "less than or equal to 1"),
        ({"task": "needle_multikey", "keys": 1}, "keys"),
        ({"task": "spans", "documents": 0}, "documents"),
        ({"text": "pydoc"}, "expected NAME"),
        (3, "expected NAME"),
    ],
)
def test_wrong_settings_are_refused(value: Any, said: str):
    with pytest.raises(InvalidConfigError, match=said):
        read_task(value, source="suite")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"suite: no task named 'perplexty'\. Did you mean 'perplexity'\?"):
        read_task("perplexty", source="suite")


def test_perplexity_is_the_loss_of_the_documents_ends():
    loaded = load(TINY)
    source = Source(loaded.tokenizer, read_text())
    task = read_task({"task": "perplexity", "documents": 3, "scored": 16}, source="t").fitted([64, 128])
    with posenc.apply(loaded.model, "rope") as handle:
        subject = Subject(loaded, handle)
        short, long = (list(task.measure(subject, source, length, 0)) for length in (64, 128))
        other = list(task.measure(subject, source, 64, 1))
        documents = task.cut(source, 64, 0)  # type: ignore[attr-defined]
        assert documents.shape == (3, 128)
        expected = list(document_losses(loaded.model, documents, 64, 16))
    assert [sample.score for sample in short] == expected
    assert [sample.score for sample in short] != [sample.score for sample in long]
    assert [sample.score for sample in short] != [sample.score for sample in other]


def test_the_shipped_model_finds_spans_inside_its_window():
    loaded = load(TINY)
    source = Source(loaded.tokenizer, read_text())
    task = read_task({"task": "spans", "documents": 2}, source="t")
    with posenc.apply(loaded.model, "rope") as handle:
        samples = list(task.measure(Subject(loaded, handle), source, 256, 0))
    assert {sample.depth for sample in samples} == {0.1, 0.3, 0.5, 0.7, 0.9}
    assert over_documents(samples).mean > 0.6


def test_errors_are_over_documents():
    samples = [Sample(document=d, score=s) for d, s in ((0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0))]
    assert over_documents(samples).values == (0.5, 1.0)
    assert np.isnan(over_documents([Sample(document=0, score=None)]).mean)
