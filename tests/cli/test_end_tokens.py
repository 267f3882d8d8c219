"""For checkpoints with no, one or several end tokens (Llama 3 Instruct, Gemma 3), generation ends at any of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import posenc
from posenc.evaluate.models import end_tokens, load, pad_token
from posenc.evaluate.shared_prefill import SharedPrefill

PROMPT = "the quick brown fox"
NEW = 8


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "checkpoint"))


def name_ends(folder: Path, ends: int | list[int] | None, pad: int | None = None) -> None:
    for name in ("config.json", "generation_config.json"):
        data = json.loads((folder / name).read_text()) | {"eos_token_id": ends, "pad_token_id": pad}
        (folder / name).write_text(json.dumps(data))


def said(folder: Path) -> list[int]:
    """Return the greedy continuation of the prompt, without an end token."""
    name_ends(folder, None)
    loaded = load(str(folder))
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = loaded.model.generate(prompt, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("several", [False, True])
def test_generate_ends_at_any_end_token(run, folder: Path, several: bool):
    tokens = said(folder)
    last = next(at for at in range(1, NEW) if tokens[at] not in tokens[:at])
    name_ends(folder, [299, tokens[last], 298] if several else tokens[last])
    result = run("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", NEW, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == last + 1


def test_an_answer_ends_at_any_end_token(folder: Path):
    tokens = said(folder)
    last = next(at for at in range(1, NEW) if tokens[at] not in tokens[:at])
    name_ends(folder, [299, tokens[last]])
    loaded = load(str(folder))
    prompt = loaded.tokenizer(PROMPT, return_tensors="np")["input_ids"][0]
    with posenc.apply(loaded.model, "rope") as handle:
        assert SharedPrefill(loaded.model, handle).answer(prompt, NEW) == tokens[:last]


@pytest.mark.parametrize(
    ("ends", "pad", "found", "padding"),
    [(None, None, (), 0), (5, None, (5,), 5), ([7, 5], None, (7, 5), 7), ([7, 5], 3, (7, 5), 3), (0, None, (0,), 0)],
)
def test_end_and_padding_tokens_are_read_from_the_configuration(
    folder: Path, ends, pad, found: tuple[int, ...], padding: int
):
    name_ends(folder, ends, pad)
    model = load(str(folder)).model
    assert (end_tokens(model), pad_token(model)) == (found, padding)
