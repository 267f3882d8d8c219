"""Tasks of a suite: the built-in ones, registered as a third party's would be, and how one is read.

A new one is a :class:`~posenc.evaluate.tasks.base.Task`, registered here or by a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posenc.errors import InvalidConfigError, UnknownNameError
from posenc.hookspecs import hookimpl
from posenc.params import explain_validation

if TYPE_CHECKING:
    from posenc.evaluate.tasks.base import Task


@hookimpl
def posenc_register_tasks(register: Callable[[type[Task]], None]) -> None:
    """Register the built-in tasks."""
    from posenc.evaluate.tasks.counting import CommonWords, FrequentWords
    from posenc.evaluate.tasks.needles import MultiKey, MultiQuery, MultiValue, SingleNeedle
    from posenc.evaluate.tasks.passkey import Passkey, SinglePasskey
    from posenc.evaluate.tasks.prose import Perplexity
    from posenc.evaluate.tasks.spans import SingleSpan, Spans
    from posenc.evaluate.tasks.variables import VariableTracking

    register(Perplexity)
    register(Spans)
    register(SingleSpan)
    register(Passkey)
    register(SinglePasskey)
    register(SingleNeedle)
    register(MultiKey)
    register(MultiValue)
    register(MultiQuery)
    register(VariableTracking)
    register(CommonWords)
    register(FrequentWords)


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
    from posenc.plugins import tasks  # which imports this module to find the built-in tasks

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
