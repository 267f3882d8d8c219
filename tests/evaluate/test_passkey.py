"""The passkey prompts and their scoring, and unpacking the SmolLM2 model from its package into a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posenc.errors import InvalidInputError, PosencError
from posenc.evaluate import smollm2
from posenc.evaluate.demo_smollm2 import Answers, configs, estimate_seconds, make_prompts
from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.passkey import NEEDLE, QUESTION, SinglePasskey
from posenc.evaluate.tasks.questions import Question, Reference
from posenc.evaluate.texts import Text


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


SOURCE = Source(Characters(), Text("dots", "." * 5000))


def question(length: int, depth: float, document: int = 0) -> Question:
    task = SinglePasskey(depth=depth)
    (prompt_question,) = task.questions(SOURCE, length, task.random(length, 0, document))
    return prompt_question


def key(prompt_question: Question) -> str:
    return prompt_question.references[0].text


@pytest.mark.parametrize("length", [200, 1000, 4999])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_a_prompt_has_its_length_its_key_and_its_question(length: int, depth: float):
    prompt_question = question(length, depth)
    text = "".join(map(chr, prompt_question.prompt))
    assert len(prompt_question.prompt) == length
    assert text.count(key(prompt_question)) == 2
    assert key(prompt_question).isdigit()
    assert text.endswith("What is the pass key? The pass key is")
    before = text.index("\n\nThe pass key is")
    assert before == pytest.approx(depth * (length - len(NEEDLE) - len(QUESTION)), abs=20)


def test_prompts_are_the_same_every_time_and_differ_by_depth_and_document():
    first, again, other = (question(500, depth) for depth in (0.1, 0.1, 0.5))
    assert key(first) == key(again)
    assert (first.prompt == again.prompt).all()
    assert key(first) != key(other)
    assert key(first) != key(question(500, 0.1, document=1))


def test_the_keys_are_those_that_the_demo_has_always_asked_for():
    rng = np.random.default_rng([0, 500, 100])
    assert key(question(500, 0.1)) == "".join(map(str, rng.integers(1, 10, 5)))


@pytest.mark.parametrize(
    ("length", "depth", "said"),
    [
        (20, 0.5, "20 tokens have no room"),
        (9000, 0.5, "the text dots has 5000"),
        (500, 1.5, "depth: must lie between 0 and 1, got 1.5"),
        (-1, 0.5, "length -1: must be at least 1 token"),
    ],
)
def test_impossible_prompts_are_refused(length: int, depth: float, said: str):
    with pytest.raises(InvalidInputError, match=said):
        make_prompts(SOURCE, [length], [depth])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 12345. Remember", 1.0),
        ("12345", 1.0),
        (" 1 2 3 4 5", 1.0),
        (" 12945", 0.4),
        (" the", 0.0),
        ("", 0.0),
        ("92345", 0.0),
    ],
)
def test_the_score_is_the_share_of_right_digits(answer: str, expected: float):
    assert SinglePasskey().score(Reference("12345"), answer) == expected


def test_whole_keys_are_counted_by_length():
    rows = [{"length": length, "score": score} for length, score in ((20, 1.0), (10, 1.0), (10, 0.8))]
    counts = Answers(configs()["native (plain RoPE)"], rows).by_length()
    assert list(counts.items()) == [(10, (1, 2)), (20, (1, 1))]


def test_shorter_prompts_are_asked_first():
    prompts = make_prompts(SOURCE, [4000, 500], [0.1, 0.9])
    assert [(length, task.depth) for length, task in prompts] == [(500, 0.1), (500, 0.9), (4000, 0.1), (4000, 0.9)]


def test_longer_prompts_are_estimated_to_take_longer():
    short, long = make_prompts(SOURCE, [500, 4000], [0.5])
    assert estimate_seconds([short], 2) < estimate_seconds([long], 2) < estimate_seconds([long, long], 2)


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POSENC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-distribution")
    with pytest.raises(PosencError, match="make demo-smollm2"):
        smollm2.prepare()


def test_the_unpacked_model_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POSENC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")
    unpacked = []

    def unpack(source: Path, folder: Path) -> None:
        unpacked.append(source)
        (folder / smollm2.WEIGHTS).write_bytes(b"weights")

    monkeypatch.setattr("posenc.hf.model_files.unpack_gguf", unpack)
    assert smollm2.prepare() == smollm2.prepare() == tmp_path / "smollm2"
    assert len(unpacked) == 1


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POSENC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")

    def interrupted(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("posenc.hf.model_files.unpack_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare()
    assert not list(tmp_path.iterdir())
