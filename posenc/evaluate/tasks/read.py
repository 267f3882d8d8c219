"""Read a task from a suite."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from posenc.errors import InvalidConfigError, UnknownNameError
from posenc.evaluate.tasks.base import Task
from posenc.params import explain_validation
from posenc.plugins import tasks


def read_task(value: Any, *, source: str) -> Task:
    """Make a task from ``NAME`` or ``{task: NAME, setting: value, ...}``.

    Parameters
    ----------
    value
        As it stands in a suite.
    source : str
        Begins every message.

    Raises
    ------
    UnknownNameError
        If no task has that name; suggests the nearest one.
    InvalidConfigError
        If a setting is wrong.
    """
    settings = {"task": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise InvalidConfigError(f"{source}: expected NAME or {{task: NAME, setting: value}}, got {value!r}.")
    try:
        factory: type[Task] = tasks()[settings["task"]].factory
    except UnknownNameError as error:
        raise UnknownNameError(f"{source}: {error}") from None
    fields = {key: setting for key, setting in settings.items() if key != "task"}
    if not all(isinstance(key, str) for key in fields):
        raise InvalidConfigError(f"{source}: the names of settings must be words.")
    try:
        return factory(**fields)
    except ValidationError as error:
        message = explain_validation(error, path=source, known=list(factory.model_fields))
        raise InvalidConfigError(message) from None
