"""One process's view of a sweep: it loads a model and texts once, names cells, and measures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from posenc.config import Config, read_config
from posenc.errors import InvalidInputError
from posenc.evaluate import fingerprint
from posenc.evaluate.models import Loaded, ModelSpec, load
from posenc.evaluate.sweep.results import CellResult, identify, rounded
from posenc.evaluate.tasks.base import Source, Subject, Task
from posenc.evaluate.tasks.read import read_task
from posenc.evaluate.texts import read_text
from posenc.files import plain
from posenc.params import Fingerprint
from posenc.planning.composed import ComposedStrategy
from posenc.positions import PositionStrategy
from posenc.trace import quiet


class Cell(BaseModel):
    """One thing to measure, complete: a worker in another process needs nothing else.

    Parameters
    ----------
    label : str
        The strategy's name in tables; not part of the identity.
    model : ModelSpec
        What to load; the identity has its fingerprint and dtype, not the device.
    config, task : dict
        As a suite writes them, everything given.
    length, seed : int
    identity : dict
        Everything that determines the result.
    against : str, optional
        Label of the strategy that the report compares it with; not part of the identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    model: ModelSpec
    config: dict[str, Any]
    task: dict[str, Any]
    length: int
    seed: int
    identity: dict[str, Any]
    against: str | None = None

    @property
    def id(self) -> str:
        """Hash of the identity."""
        return identify(self.identity)

    @property
    def tokens(self) -> int:
        """Tokens that are read, answers and shared prefixes not counted."""
        return read_task(self.task, source=self.label).prefills * self.length


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
        """That model; another one is forgotten, since memory holds one large model."""
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
        """Put a cell together.

        Raises
        ------
        PosencError
            If the strategy makes no plan of that length, or the task cannot be made.
        """
        loaded = self.loaded(model)
        strategy = config.make(loaded.window).for_model(lambda: self.fingerprint(model))
        strategy.plan(length)
        source = self.source(model, task.text)
        task.check(source, length, seed)
        identity = {
            **self._model_facts(model),
            "strategy": _determined(strategy),
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
        """Measure a cell; the model is as it was afterwards.

        Raises
        ------
        InvalidInputError
            If the model, text or calibration file is no longer what the cell was made for.
        PosencError
            If the strategy does not fit the model.
        """
        config, task = read_config(cell.config, source=cell.label), read_task(cell.task, source=cell.label)
        found = self.cell(cell.label, cell.model, config, task, cell.length, cell.seed)
        if found.id != cell.id:
            changed = ", ".join(key for key in cell.identity if cell.identity[key] != found.identity.get(key))
            raise InvalidInputError(f"{cell.label}: {changed} changed since this sweep was started. Start it again.")
        loaded = self.loaded(cell.model)
        with quiet(), Subject.under(loaded, config) as subject:  # a strategy's warnings are not needed beside its score
            source = self.source(cell.model, task.text)
            samples = list(task.measure(subject, source, cell.length, cell.seed))
        return CellResult(id=cell.id, identity=cell.identity, samples=rounded(samples))

    def fingerprint(self, model: ModelSpec) -> Fingerprint:
        """What tells that model from others."""
        if model not in self._fingerprints:
            from posenc.hf.apply import find_adapter
            from posenc.hf.fingerprint import fingerprint as of_model

            loaded = self.loaded(model).model
            self._fingerprints[model] = of_model(loaded, find_adapter(loaded))
        return self._fingerprints[model]

    def _model_facts(self, model: ModelSpec) -> dict[str, Any]:
        return {
            "model": self.fingerprint(model).model_dump(mode="json"),
            "dtype": self.loaded(model).dtype,
            "tokenizer": self._tokenizer(model),
        }

    def _tokenizer(self, model: ModelSpec) -> str:
        if model not in self._tokenizers:
            self._tokenizers[model] = fingerprint.of_tokenizer(self.loaded(model).tokenizer)
        return self._tokenizers[model]


def _determined(strategy: PositionStrategy) -> dict[str, Any]:
    """Every parameter of a strategy, defaults and the content of calibration files included."""
    if isinstance(strategy, ComposedStrategy):
        return {**_determined(strategy.positions), "frequencies": _determined(strategy.frequencies)}
    parameters = strategy.params.model_dump(mode="json")
    return {**parameters, "window": strategy.window, **plain(strategy.describe())}
