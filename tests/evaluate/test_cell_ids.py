"""The id of a cell is a hash of everything that determines its result, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posenc.config import read_config
from posenc.errors import InvalidInputError
from posenc.evaluate.models import ModelSpec
from posenc.evaluate.sweep.session import Session
from posenc.evaluate.tasks import read_task
from tests.evaluate.sweeps import SMALL, plan

TINY = ModelSpec(name="tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": [24, 41]},
        {"seeds": [1]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 13}}]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}, "frequencies": "ntk"}]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}, "backend": "reference"}]},
        {"tasks": [{"task": "perplexity", "documents": 3, "scored": 8}]},
        {"model": {"name": "tiny", "dtype": "bfloat16"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_everything_that_determines_a_result_is_in_the_id(changes: dict[str, Any], tmp_path: Path, session: Session):
    before, after = (plan(tmp_path, SMALL, session, **given).cells[-1].id for given in ({}, changes))
    assert before != after


def test_neither_a_label_nor_a_spelled_out_default_changes_the_id(tmp_path: Path, session: Session):
    ids = [
        plan(tmp_path, SMALL, session, strategies=[chosen]).cells[0].id
        for chosen in ("yarn", {"label": "mine", "strategy": {"name": "yarn", "factor": 4}})
    ]
    assert ids[0] == ids[1]


def test_the_device_is_not_in_the_id(tmp_path: Path, session: Session):
    ids = [
        plan(tmp_path, SMALL, session, model=model).cells[0].id for model in ("tiny", {"name": "tiny", "device": "cpu"})
    ]
    assert ids[0] == ids[1]


def test_the_content_of_a_text_is_in_the_id_and_its_name_is_not(tmp_path: Path):
    ids = []
    for name, words in (("a.txt", "one two "), ("a.txt", "one three "), ("b.txt", "one two ")):
        (tmp_path / name).write_text(words * 200)
        task = {"task": "perplexity", "documents": 2, "scored": 8, "text": str(tmp_path / name)}
        ids.append(plan(tmp_path, SMALL, Session(), tasks=[task]).cells[0].id)
    assert ids[0] == ids[2] != ids[1]


def test_the_model_and_the_tokenizer_are_in_the_id(tmp_path: Path, session: Session):
    import torch

    before = session.cell("a", TINY, *_one(tmp_path, session))
    with torch.no_grad():
        weight = session.loaded(TINY).model.model.layers[0].self_attn.q_proj.weight
        kept = weight.clone()
        weight[0, 0] += 1
        other = Session(loader=lambda which: session.loaded(TINY))
        changed = other.cell("a", TINY, *_one(tmp_path, other))
        weight.copy_(kept)
    assert before.id != changed.id
    with pytest.raises(InvalidInputError, match="model changed since"):
        session.measure(changed)


def _one(folder: Path, session: Session) -> tuple[Any, ...]:
    task = read_task({"task": "perplexity", "documents": 1, "scored": 4, "longest": 24}, source="t")
    return read_config({"strategy": "rope"}), task, 24, 0
