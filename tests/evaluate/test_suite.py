"""A suite is checked before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posenc.config import read_config
from posenc.errors import InvalidConfigError, PosencError
from posenc.evaluate.sweep.session import Session
from posenc.evaluate.sweep.suite import make_cells, read_suite
from posenc.evaluate.tasks import read_task
from tests.evaluate.sweeps import ROOT, SMALL, write

SECOND = ROOT / "benchmarks/tiny-qwen3.yaml"
"""A calibration file; the others are suites."""
BENCHMARKS = sorted(set((ROOT / "benchmarks").glob("*.yaml")) - {SECOND})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": ["4y"]}, "multiple such as 4x"),
        ({"lengths": [0]}, "multiple such as 4x"),
        ({"lengths": [4]}, "rope, perplexity, 4 tokens: length 4"),
        ({"lengths": [10_000_000]}, "10000000 tokens: .*too short"),
        ({"length": [40]}, "length: no such key. Known keys: name, model"),
        ({"strategies": ["lmpe"]}, "Did you mean 'lampe'"),
        ({"strategies": ["rope", "rope"]}, "the label 'rope' comes twice"),
        ({"strategies": ["rope", {"label": "b", "strategy": "rope"}]}, "b, perplexity, 24 tokens is the same as rope"),
        ({"strategies": [{"strategy": {"name": "rerope", "window": -3}}]}, "window"),
        ({"strategies": [{"strategy": {"name": "rerope", "widow_size": 3}}]}, "widow_size"),
        ({"strategies": [{"label": 3, "strategy": "rope"}]}, r"strategies\[0\].label"),
        ({"strategies": [{"calibrated": "rerope"}]}, "needs the suite's key 'calibration'"),
        ({"strategies": [{"calibrated": "rerope"}], "calibration": "missing.yaml"}, "missing.yaml"),
        ({"strategies": [{"transferred_from": "a.yaml", "strategy": "rope"}]}, "belongs to 'calibrated: NAME'"),
        ({"strategies": [{"calibrated": "rerope", "transferred_from": 3}]}, r"transferred_from: must be a text"),
        ({"strategies": ["rope", {"strategy": "dca", "against": "rop"}]}, r"'rop', which is no label.* are: rope\."),
        ({"strategies": [{"strategy": "dca", "against": "dca"}]}, "which is no label of another strategy"),
        ({"tasks": ["perplexiti"]}, r"tasks\[0\]: no task named"),
        ({"tasks": [{"task": "perplexity", "text": "nowhere.txt"}]}, "nowhere.txt: cannot be read"),
        ({"name": "a/b"}, "name"),
        ({"model": "no/such"}, "cannot load"),
        ({"model": 5}, "model: expected a model's name, or a mapping with the keys name, dtype, device"),
        ({"model": {"name": "tiny", "devise": "cpu"}}, "mapping with the keys name, dtype, device"),
        ({"model": {"name": "tiny", "dtype": "int8"}}, r"model\.dtype: Input should be 'float32'"),
        ({"model": {"name": "tiny", "device": "cuda:99"}}, "device 'cuda:99': torch cannot use it here"),
    ],
    ids=str,
)
def test_a_wrong_suite_is_refused_before_anything_is_measured(
    changes: dict[str, Any], said: str, tmp_path: Path, session: Session
):
    path = write(tmp_path, SMALL, **changes)
    fresh = Session() if "model" in changes else session
    with pytest.raises(PosencError, match=said):
        make_cells(read_suite(path), fresh, source=str(path))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.name)
def test_the_suites_of_the_results_are_readable(file: Path, tmp_path: Path):
    suite = read_suite(file)
    assert suite.name == file.stem
    assert suite.lengths_for(256)
    tasks = [read_task(task, source=file.name) for task in suite.tasks]
    assert tasks
    for entry in suite.strategies:
        if isinstance(entry, dict) and ("calibrated" in entry or "profiles" in str(entry)):
            continue  # made by posenc calibrate
        entry = {"strategy": entry} if isinstance(entry, str) else entry
        given = {key: value for key, value in entry.items() if key not in ("label", "against")}
        read_config(given, source=file.name).make(8192).plan(9000)


def test_lengths_are_tokens_or_windows(tmp_path: Path):
    suite = read_suite(write(tmp_path, SMALL, lengths=["2x", 24, "0.5x", "1x"]))
    assert suite.lengths_for(256) == [24, 128, 256, 512]
    with pytest.raises(InvalidConfigError, match="needs the model's window"):
        suite.lengths_for(None)
