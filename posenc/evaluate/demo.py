"""The main job: the shipped model on long text it was not trained on, with and without remapping."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import posenc
from posenc.config import Config
from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.evaluate.compare import Outcome, Task, compare
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import check_lengths
from posenc.evaluate.texts import Text, cut_documents, tokenize
from posenc.files import plain, replacing

MULTIPLES = (1, 2, 4, 8)
DOCUMENTS = 32
RETRIEVAL_DOCUMENTS = 40
SCORED = 128
CONFIG = Path("examples") / "demo.yaml"


@dataclass(frozen=True)
class Demo:
    """A finished demo.

    Parameters
    ----------
    outcomes : dict of str to Outcome
        What each strategy scored, by label.
    task : Task
        What was measured.
    seconds : float
        Time measured, loading not included.
    """

    outcomes: dict[str, Outcome]
    task: Task
    loaded: Loaded
    text: Text
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything needed to check or plot the results again."""
        return {
            "model": self.loaded.name,
            "window": self.loaded.window,
            "text": {"name": self.text.name, "characters": len(self.text.content)},
            "settings": {
                "lengths": list(self.task.lengths),
                "documents": len(self.task.documents),
                "scored_tokens": self.task.scored,
                "retrieval_documents": 0
                if self.task.retrieval_documents is None
                else len(self.task.retrieval_documents),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("posenc", "torch", "transformers", "numpy")},
            },
            "seconds": round(self.seconds, 1),
            "strategies": {label: outcome.as_dict() for label, outcome in self.outcomes.items()},
        }


def find_config() -> Path:
    """The demo's configuration: in the working folder, in the source tree, or in the installed package.

    Raises
    ------
    InvalidConfigError
        If it is in none of them.
    """
    candidates = (CONFIG, Path(posenc.__file__).parents[1] / CONFIG, Path(__file__).parent / CONFIG.name)
    for path in candidates:
        if path.is_file():
            return path
    raise InvalidConfigError(f"{CONFIG}: not found here nor in the installation. Pass --config FILE.")


def prepare(loaded: Loaded, text: Text, *, documents: int = DOCUMENTS, multiples: tuple[int, ...] = MULTIPLES) -> Task:
    """Cut the text into the documents of the demo.

    Raises
    ------
    InvalidInputError
        If the model's window is unknown or the text is too short.
    """
    if loaded.window is None:
        raise InvalidInputError(f"{loaded.name}: the model's configuration does not tell its window.")
    lengths = [loaded.window * multiple for multiple in multiples]
    scored = min(SCORED, loaded.window // 2)
    check_lengths(lengths, scored)
    tokens = tokenize(loaded.tokenizer, text)
    asked = RETRIEVAL_DOCUMENTS if documents == DOCUMENTS else documents
    return Task(
        lengths,
        cut_documents(tokens, max(lengths), documents, step=scored, name=text.name),
        scored,
        cut_documents(tokens, max(lengths), asked, step=scored, name=text.name),
    )


def run(
    loaded: Loaded, text: Text, configs: Mapping[str, Config], task: Task, step: Callable[[str], None] | None = None
) -> Demo:
    """Measure."""
    began = time.perf_counter()
    outcomes = compare(loaded, configs, task, step)
    return Demo(outcomes, task, loaded, text, time.perf_counter() - began)


def write(demo: Demo, folder: Path) -> list[Path]:
    """Write the results and, where matplotlib is installed, the plots; returns the files.

    Raises
    ------
    InvalidInputError
        If the folder cannot be written.
    """
    results = save_json(demo.as_dict(), folder / "results.json")
    return [results, *_plots(demo, folder)]


def save_json(data: dict[str, Any], path: Path) -> Path:
    """Write strict JSON (NaN becomes null), making the folder; never a half-written file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{path.parent}: cannot be created ({error.strerror or error}).") from None
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(data), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _plots(demo: Demo, folder: Path) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    from posenc.display import viz

    window = demo.loaded.window
    lengths = demo.task.lengths
    losses = {
        label: [(n, o.perplexity[n].value, o.perplexity[n].standard_error) for n in lengths]
        for label, o in demo.outcomes.items()
    }
    scores = {
        label: [(n, o.retrieval[n].scores.mean, o.retrieval[n].scores.standard_error) for n in lengths]
        for label, o in demo.outcomes.items()
        if o.retrieval
    }
    longest = max(lengths)
    plans = {label: o.config.make(window).plan(longest) for label, o in demo.outcomes.items()}
    name = f"{demo.loaded.name} model on {demo.text.name}"
    files = [
        viz.plot_lines(
            losses,
            folder / "perplexity.png",
            title=name,
            ylabel="perplexity (lower is better)",
            window=window,
            log=True,
        ),
        viz.plot_maps(plans, folder / "position-maps.png"),
    ]
    if scores:
        files.insert(
            1, viz.plot_lines(scores, folder / "retrieval.png", title=name, ylabel="tokens retrieved", window=window)
        )
    return files
