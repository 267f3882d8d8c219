"""A small random model and one calibration of it: the tests are about the procedure, not about the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posenc.calibration.file import write
from posenc.evaluate.calibrate import job as work
from posenc.evaluate.calibrate.search import candidates
from posenc.evaluate.models import Loaded

WINDOW, VOCABULARY = 32, 60


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]


def make_model(seed: int = 0) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        eos_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_text(seed: int, words: int = 600) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + letter) for letter in rng.integers(0, 26, 5)) for _ in range(words))


@pytest.fixture(scope="package", autouse=True)
def _fewer_candidates() -> Iterator[None]:
    """Keep every third candidate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "candidates", lambda *given: candidates(*given)[::3])
        yield


@pytest.fixture(scope="package")
def loaded() -> Loaded:
    return Loaded("small", make_model(), Letters())


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    files = folder / "choose.txt", folder / "report.txt"
    for seed, file in enumerate(files):
        file.write_text(make_text(seed))
    return str(files[0]), str(files[1])


@pytest.fixture(scope="package")
def options(texts: tuple[str, str]) -> work.CalibrationOptions:
    return work.CalibrationOptions(
        ("lampe", "rerope"), texts[:1], texts[1:], (WINDOW, 2 * WINDOW, 3 * WINDOW), 10, 8, 0, "a test"
    )


@pytest.fixture(scope="package")
def calibrated(
    loaded: Loaded, options: work.CalibrationOptions, tmp_path_factory: pytest.TempPathFactory
) -> tuple[work.CalibrationOutcome, Path]:
    """A finished calibration, and its file."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / work.CELLS).mkdir()
    outcome = work.run(work.prepare(loaded, options), folder)
    return outcome, write(outcome.calibration, folder / "calibration.yaml")
