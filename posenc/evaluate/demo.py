"""The demo: the shipped model on long text that it was not trained on, with and without remapping."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import posenc
from posenc.config import Config
from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.evaluate import compare
from posenc.evaluate.compare import Comparison, StrategyScores
from posenc.evaluate.models import Loaded
from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.prose import SCORED
from posenc.evaluate.texts import Text
from posenc.files import make_folder, write_json
from posenc.trace import versions

MULTIPLES = (1, 2, 4, 8)
DOCUMENTS = 32
RETRIEVAL_DOCUMENTS = 40
CONFIG = Path("examples") / "demo.yaml"


@dataclass(frozen=True)
class Demo:
    """A finished demo.

    Parameters
    ----------
    scores : dict of str to StrategyScores
        What each strategy scored, by label.
    comparison : Comparison
        What was measured.
    seconds : float
        Time of the measurement, without loading.
    """

    scores: dict[str, StrategyScores]
    comparison: Comparison
    loaded: Loaded
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything needed to check or plot the results again."""
        text = self.comparison.source.text
        return {
            "model": self.loaded.name,
            "window": self.loaded.window,
            "text": {"name": text.name, "characters": len(text.content)},
            "settings": {
                "lengths": list(self.comparison.lengths),
                "documents": self.comparison.documents,
                "scored_tokens": self.comparison.perplexity.scored,
                "retrieval_documents": self.comparison.retrieval_documents,
            },
            "versions": versions(),
            "seconds": round(self.seconds, 1),
            "strategies": {label: scores.as_dict() for label, scores in self.scores.items()},
        }


def find_config() -> Path:
    """Find the demo's configuration in the working folder, the source tree or the installed package.

    Raises
    ------
    InvalidConfigError
        If it is in none of them.
    """
    candidates = (CONFIG, Path(posenc.__file__).parents[1] / CONFIG, Path(__file__).parent / CONFIG.name)
    for path in candidates:
        if path.is_file():
            return path
    raise InvalidConfigError(f"{CONFIG}: it is neither here nor in the installation. Pass --config FILE.")


def prepare(
    loaded: Loaded, text: Text, *, documents: int = DOCUMENTS, multiples: tuple[int, ...] = MULTIPLES
) -> Comparison:
    """Fit the tasks of the demo to a model and a text.

    Raises
    ------
    InvalidInputError
        If the window of the model is unknown or the text is too short.
    """
    if loaded.window is None:
        raise InvalidInputError(f"{loaded.name}: the model's configuration does not tell its window.")
    return compare.prepare(
        Source(loaded.tokenizer, text),
        [loaded.window * multiple for multiple in multiples],
        scored=min(SCORED, loaded.window // 2),
        documents=documents,
        retrieval_documents=RETRIEVAL_DOCUMENTS if documents == DOCUMENTS else documents,
    )


def run(loaded: Loaded, comparison: Comparison, configs: Mapping[str, Config], step: Callable[[str], None]) -> Demo:
    """Measure every configuration."""
    began = time.perf_counter()
    scores = compare.compare(loaded, configs, comparison, step)
    return Demo(scores, comparison, loaded, time.perf_counter() - began)


def write(demo: Demo, folder: Path) -> list[Path]:
    """Write the results and, where matplotlib is installed, the plots; returns the files.

    Raises
    ------
    InvalidInputError
        If the folder cannot be written.
    """
    results = write_json(demo.as_dict(), make_folder(folder) / "results.json")
    return [results, *_plots(demo, folder)]


def _plots(demo: Demo, folder: Path) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    from posenc.display import viz

    window = demo.loaded.window
    lengths = demo.comparison.lengths
    perplexities = {
        label: [(n, scores.perplexity[n].value, scores.perplexity[n].standard_error) for n in lengths]
        for label, scores in demo.scores.items()
    }
    retrieved = {
        label: [(n, scores.retrieval[n].scores.mean, scores.retrieval[n].scores.standard_error) for n in lengths]
        for label, scores in demo.scores.items()
        if scores.retrieval
    }
    longest = max(lengths)
    plans = {label: scores.config.make(window).plan(longest) for label, scores in demo.scores.items()}
    name = f"{demo.loaded.name} model on {demo.comparison.source.text.name}"
    files = [
        viz.plot_lines(
            perplexities,
            folder / "perplexity.png",
            title=name,
            ylabel="perplexity (lower is better)",
            window=window,
            log=True,
        ),
        viz.plot_maps(plans, folder / "position-maps.png"),
    ]
    if retrieved:
        files.insert(
            1, viz.plot_lines(retrieved, folder / "retrieval.png", title=name, ylabel="tokens retrieved", window=window)
        )
    return files
