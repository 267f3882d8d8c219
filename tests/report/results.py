"""Made-up results, for which nothing had to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posenc.evaluate.sweep.results import Sweep, SweepEntry, identify, write_sweep
from posenc.evaluate.tasks.base import Sample

STRATEGIES: dict[str, dict[str, Any]] = {
    "rope": {"name": "rope", "window": 256},
    "lampe": {"name": "lampe", "window": 256, "mapping": 128, "head": 64},
    "lampe + yarn": {
        "name": "lampe",
        "window": 256,
        "mapping": 128,
        "head": 64,
        "frequencies": {"name": "yarn", "window": 256, "factor": 2.0},
    },
}
LENGTHS = (256, 1024)
LOSSES = {"rope": (3.0, 5.0), "lampe": (3.0, 3.1), "lampe + yarn": (3.1, 3.2)}
FOUND = {"rope": (1.0, 0.0), "lampe": (1.0, 0.8), "lampe + yarn": (0.9, 0.7)}
DEPTHS = (0.1, 0.9)


def sweep(**changes: Any) -> Sweep:
    """Two tasks, two lengths, three strategies, four documents."""
    cells = []
    for label, strategy in STRATEGIES.items():
        for at, length in enumerate(LENGTHS):
            losses = [Sample(document=d, score=LOSSES[label][at] + 0.1 * d) for d in range(4)]
            found = [Sample(document=d, depth=depth, score=FOUND[label][at]) for d in range(4) for depth in DEPTHS]
            for task, metric, samples in (("perplexity", "loss", losses), ("passkey", "accuracy", found)):
                identity = {"strategy": strategy, "length": length, "task": task}
                cells.append(
                    SweepEntry(
                        id=identify(identity),
                        label=label,
                        task=task,
                        metric=metric,  # type: ignore[arg-type]
                        length=length,
                        seed=0,
                        identity=identity,
                        samples=tuple(samples),
                        against="lampe" if label == "lampe + yarn" else None,
                    )
                )
    facts: dict[str, Any] = {
        "name": "made-up",
        "command": "posenc eval made-up.yaml",
        "model": "tiny",
        "window": 256,
        "versions": {"posenc": "0.1.0"},
        "cells": tuple(cells),
    }
    return Sweep(**{**facts, **changes})


def score(loss: float) -> dict[str, Any]:
    """A score as in a calibration file."""
    return {"loss": loss, "standard_error": 0.05, "over_native": -0.5, "over_native_error": 0.02, "documents": 4}


CALIBRATION: dict[str, Any] = {
    "calibration": {
        "format": "posenc-calibration",
        "version": 1,
        "command": "posenc calibrate tiny --text novel.txt --json",
        "model": {"name": "tiny", "fingerprint": {"model_type": "llama", "window": 256, "weights": "0"}},
        "texts": {
            "calibration": [{"name": "novel.txt", "tokens": 9000, "sha256": "0"}],
            "report": [{"name": "topics", "tokens": 9000, "sha256": "1"}],
        },
        "settings": {"lengths": [1024], "scored_tokens": 128, "documents": 3, "seed": 0, "stopping": "never"},
        "versions": {"posenc": "0.1.0"},
        "mapping": {"c": 180.999, "a": 0.001, "b": 0.5},
        "head": 64,
        "tail": 12,
        "confidence": {"samples": 1000, "a": [0.0, 0.002], "b": [-1.0, 1.0], "mapping_length": {"1024": [95, 139]}},
        "fitted": {
            "1024": {"params": {"head": 64, "mapping": {"c": 180.999}}, "tried": 1, "calibration": score(3.2)},
        },
        "native": {"1024": score(5.0)},
        "native_report": {"1024": score(5.2)},
        "strategies": {
            "lampe": {
                "1024": {"params": {"mapping": 128}, "tried": 3, "calibration": score(3.0), "report": score(3.1)},
            }
        },
    },
    "sweeps": {
        "lampe": {
            "1024": [
                {
                    "params": {"mapping": mapping, "head": 64},
                    "max_relative": 200.0,
                    "dropped": len(losses) < 3,
                    "losses": losses,
                }
                for mapping, losses in {64: [3.2, 3.1, 3.3], 128: [3.0, 2.9, 3.1], 512: [4.0, 4.3]}.items()
            ]
        }
    },
    "files": ["calibration.yaml"],
}


def write_all(folder: Path) -> Path:
    """A bundle, a calibration and a benchmark in one folder."""
    import json

    from posenc.bench.results import save
    from tests.bench.conftest import result

    write_sweep(sweep(), folder / "made-up.json")
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    save(result(), folder)
    return folder
