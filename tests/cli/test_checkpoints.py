"""Damaged model folders cause one message that names the folder and the cause, however they are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import posenc
from posenc.errors import InvalidInputError

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2742872\n"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(folder: Path, size: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def lose_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    places = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "gone.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def pickle_pointer(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "LFS pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), "model.safetensors is a Git LFS pointer"),
    "LFS pointer to a pickle": (pickle_pointer, "pytorch_model.bin is a Git LFS pointer"),
    "half a download": (lambda f: cut(f, 20_000), "model.safetensors is damaged or not complete"),
    "the header cut": (lambda f: cut(f, 5), "model.safetensors is damaged or not complete"),
    "no bytes": (lambda f: cut(f, 0), "model.safetensors is damaged or not complete"),
    "a shard missing": (lose_a_shard, "gone.safetensors"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
    "other sizes": (lambda f: change_config(f, intermediate_size=72), "[32, 64] in the file, [32, 72] in the model"),
    "another vocabulary": (lambda f: change_config(f, vocab_size=301), "[300, 32] in the file, [301, 32] in the model"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=3), "lack 9 of the model's tensors"),
    "config of another family": (lambda f: change_config(f, model_type="gpt_neox"), "of the model's tensors"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "ZeroDivisionError"),
    "a window of null": (lambda f: change_config(f, max_position_embeddings=None), "max_position_embeddings"),
    "unknown family": (lambda f: change_config(f, model_type="nope"), "model type `nope`"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not a valid JSON file"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "cannot load"),
}
BROKEN_TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "cannot load its tokenizer: "),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load its tokenizer: "),
}


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "checkpoint"))


def ppl(run: Any, folder: Path | str, text: Path, *more: str) -> Any:
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    chosen = ("-s", "rope", "--lengths", 64, "--score", 8, "--documents", 1)
    return run("ppl", "--model", folder, "--text", text, *chosen, *more)


@pytest.mark.parametrize("what", [*BROKEN, *BROKEN_TOKENIZERS])
def test_a_broken_folder_is_one_message_of_the_command_line(run, folder: Path, tmp_path: Path, what: str):
    damage, said = (BROKEN | BROKEN_TOKENIZERS)[what]
    damage(folder)
    result = ppl(run, folder, tmp_path / "text")
    assert (result.exit_code, result.stdout) == (2, "")
    message = next(line for line in result.stderr.splitlines() if line.startswith("posenc: "))
    assert f"posenc: {folder}: " in message
    assert said in message
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_refused_by_from_pretrained(folder: Path, what: str):
    damage, said = BROKEN[what]
    damage(folder)
    with pytest.raises(InvalidInputError) as caught:
        posenc.from_pretrained(folder, "rerope")
    assert str(caught.value).startswith(f"{folder}: ")
    assert said in str(caught.value)
    assert not (folder / "posenc.json").exists()


def test_an_unreadable_file_is_one_message(run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    result = ppl(run, folder, tmp_path / "text")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"posenc: {folder}: transformers cannot load it: [Errno 13] Permission denied")


def test_unused_weights_cause_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    change_config(folder, num_hidden_layers=1)
    posenc.from_pretrained(folder, "rerope")
    assert f"{folder}: 9 tensors of its weights have no place" in caplog.text


def test_missing_weights_may_be_random_on_request(folder: Path):
    change_config(folder, intermediate_size=72, num_hidden_layers=3)
    model = posenc.from_pretrained(folder, "rerope", ignore_mismatched_sizes=True)
    assert model.model.layers[2].mlp.up_proj.weight.shape == (72, 32)


def test_a_loaded_model_equals_that_of_transformers(folder: Path):
    import torch

    expected = AutoModelForCausalLM.from_pretrained(folder)
    model = posenc.from_pretrained(folder, "rerope")
    assert all(map(torch.equal, expected.state_dict().values(), model.state_dict().values()))
    assert json.loads((folder / "posenc.json").read_text())["strategy"] == {"name": "rerope"}
    with pytest.raises(InvalidInputError, match="output_loading_info: posenc returns the model alone"):
        posenc.from_pretrained(folder, output_loading_info=True)


def test_a_refused_choice_is_not_saved(folder: Path):
    with pytest.raises(posenc.UnsupportedModelError, match="attn_implementation='flex_attention'"):
        posenc.from_pretrained(folder, "rerope", attn_implementation="flex_attention")
    with pytest.raises(posenc.InvalidConfigError, match=r"rerope\.window_size"):
        posenc.from_pretrained(folder, {"name": "rerope", "window_size": 0})
    assert not list(folder.glob("*posenc*"))


def test_a_model_that_is_refused_late_has_no_hooks(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever fails inside apply, the model itself stays unpatched."""
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def keep(*args: Any, **kwargs: Any) -> Any:
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    def differs(*_: object) -> None:
        raise posenc.UnsupportedModelError("differs")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", keep)
    monkeypatch.setattr("posenc.hf.apply.check_identity", differs)
    with pytest.raises(posenc.UnsupportedModelError, match="differs"):
        posenc.from_pretrained(folder, "rerope")
    ((model, _),) = loaded
    assert posenc.attached(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not (folder / "posenc.json").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"[1]", b"{"])
def test_a_damaged_posenc_json_is_refused(folder: Path, content: bytes):
    (folder / "posenc.json").write_bytes(content)
    with pytest.raises(posenc.InvalidConfigError, match=r"checkpoint/posenc\.json: "):
        posenc.from_pretrained(folder)


def test_the_choice_is_not_written_through_a_link(folder: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("posenc.json.partial", "posenc.json"):
        (folder / name).symlink_to(precious)
    posenc.from_pretrained(folder, "rerope")
    assert precious.read_text() == "precious"
    assert json.loads((folder / "posenc.json").read_text())["strategy"] == {"name": "rerope"}
