"""A cell of a sweep: one strategy, length, task and seed."""

from __future__ import annotations

from typing import Any

from posenc.evaluate.models import ModelSpec
from posenc.evaluate.sweep.results import SweepEntry, identify
from posenc.evaluate.tasks import read_task
from posenc.evaluate.tasks.base import Task
from posenc.params import StrictModel


class Cell(StrictModel):
    """Everything that a process needs to measure one cell.

    Parameters
    ----------
    label : str
        The strategy's name in tables; not part of the identity.
    model : ModelSpec
        The model to load; the identity has its fingerprint and dtype, but not the device.
    config, task : dict
        The configuration and the task as a suite writes them, with every default.
    length, seed : int
    identity : dict
        Everything that determines the result.
    against : str, optional
        Label of the strategy that the report compares it with; not part of the identity.
    """

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
    def title(self) -> str:
        """``rerope, perplexity, 1024 tokens``, for messages."""
        return f"{self.label}, {self.task['task']}, {self.length} tokens"

    @property
    def tokens(self) -> int:
        """Tokens to read, without answers; prompts that share a prefix count in full."""
        return self.read_task().prefills * self.length

    @property
    def entry(self) -> SweepEntry:
        """The cell as the sweep file lists it, without samples."""
        task = self.read_task()
        return SweepEntry(
            id=self.id,
            label=self.label,
            task=task.title,
            metric=task.metric,
            length=self.length,
            seed=self.seed,
            identity=self.identity,
            against=self.against,
        )

    def read_task(self) -> Task:
        """The task with its settings."""
        return read_task(self.task, source=self.label)
