"""One process's view of a sweep: it loads models and texts once, makes cells, and measures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from posenc.config import Config, read_config
from posenc.errors import InvalidInputError
from posenc.evaluate import fingerprint
from posenc.evaluate.models import Loaded, ModelSpec, load
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.results import CellResult, rounded
from posenc.evaluate.tasks.base import Source, Subject, Task
from posenc.evaluate.texts import read_text
from posenc.files import plain
from posenc.params import Fingerprint
from posenc.planning.composed import ComposedStrategy
from posenc.positions import PositionStrategy
from posenc.trace import quiet


@dataclass
class Session:
    """Loaded models, texts and fingerprints.

    Parameters
    ----------
    loader : callable
        Loads a model.
    """

    loader: Callable[[ModelSpec], Loaded] = load
    _models: dict[ModelSpec, Loaded] = field(default_factory=dict)
    _fingerprints: dict[ModelSpec, Fingerprint] = field(default_factory=dict)
    _tokenizers: dict[ModelSpec, str] = field(default_factory=dict)
    _sources: dict[tuple[ModelSpec, str], Source] = field(default_factory=dict)

    def loaded(self, model: ModelSpec) -> Loaded:
        """Load a model. The one before is released, because memory holds one large model."""
        if model not in self._models:
            self._models.clear()
            self._models[model] = self.loader(model)
        return self._models[model]

    def source(self, model: ModelSpec, text: str) -> Source:
        """A text in the tokens of a model."""
        key = model, text
        if key not in self._sources:
            self._sources[key] = Source(self.loaded(model).tokenizer, read_text(text))
        return self._sources[key]

    def cell(self, label: str, model: ModelSpec, config: Config, task: Task, length: int, seed: int) -> Cell:
        """Make a cell and check that it can be measured.

        Raises
        ------
        PosencError
            If the strategy has no plan for that length, or the task has no room in it.
        """
        loaded = self.loaded(model)
        strategy = config.make(loaded.window).for_model(lambda: self.fingerprint(model))
        strategy.plan(length)
        source = self.source(model, task.text)
        task.check(source, length, seed)
        identity = {
            "model": self.fingerprint(model).model_dump(mode="json"),
            "dtype": loaded.dtype,
            "tokenizer": self._tokenizer(model),
            "strategy": _parameters(strategy),
            "backend": config.backend,
            "task": task.settings(),
            "text": source.fingerprint,
            "length": length,
            "seed": seed,
        }
        return Cell(
            label=label,
            model=model,
            config=config.as_dict(),
            task={"task": task.name, **task.model_dump(mode="json")},
            length=length,
            seed=seed,
            identity=plain(identity),
        )

    def measure(self, cell: Cell) -> CellResult:
        """Measure a cell; afterwards the model is as it was before.

        Raises
        ------
        InvalidInputError
            If the model, text or calibration file has changed since the cell was made.
        PosencError
            If the strategy does not fit the model.
        """
        config, task = read_config(cell.config, source=cell.label), cell.read_task()
        current = self.cell(cell.label, cell.model, config, task, cell.length, cell.seed)
        if current.id != cell.id:
            changed = ", ".join(key for key in cell.identity if cell.identity[key] != current.identity.get(key))
            raise InvalidInputError(f"{cell.label}: {changed} changed since this sweep was started. Start it again.")
        source = self.source(cell.model, task.text)
        with quiet(), Subject.under(self.loaded(cell.model), config) as subject:  # the scores show what a warning says
            samples = list(task.measure(subject, source, cell.length, cell.seed))
        return CellResult(id=cell.id, identity=cell.identity, samples=rounded(samples))

    def fingerprint(self, model: ModelSpec) -> Fingerprint:
        """What identifies a model."""
        if model not in self._fingerprints:
            from posenc.hf.apply import find_adapter
            from posenc.hf.fingerprint import fingerprint as of_model

            loaded = self.loaded(model).model
            self._fingerprints[model] = of_model(loaded, find_adapter(loaded))
        return self._fingerprints[model]

    def _tokenizer(self, model: ModelSpec) -> str:
        if model not in self._tokenizers:
            self._tokenizers[model] = fingerprint.of_tokenizer(self.loaded(model).tokenizer)
        return self._tokenizers[model]


def _parameters(strategy: PositionStrategy) -> dict[str, Any]:
    """Every parameter of a strategy, including defaults and the content of calibration files."""
    if isinstance(strategy, ComposedStrategy):
        return {**_parameters(strategy.positions), "frequencies": _parameters(strategy.frequencies)}
    parameters = strategy.params.model_dump(mode="json")
    return {**parameters, "window": strategy.window, **plain(strategy.describe())}
