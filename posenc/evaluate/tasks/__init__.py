"""The tasks of a suite, by kind. A new one is a :class:`~posenc.evaluate.tasks.base.Task` and a line here."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from posenc.errors import InvalidConfigError
from posenc.evaluate.tasks.base import Task
from posenc.evaluate.tasks.counting import CommonWords, FrequentWords
from posenc.evaluate.tasks.needles import MultiKey, MultiQuery, MultiValue, SingleNeedle
from posenc.evaluate.tasks.passkey import Passkey
from posenc.evaluate.tasks.prose import Perplexity
from posenc.evaluate.tasks.spans import Spans
from posenc.evaluate.tasks.variables import VariableTracking
from posenc.params import explain_validation

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Perplexity,
        Spans,
        Passkey,
        SingleNeedle,
        MultiKey,
        MultiValue,
        MultiQuery,
        VariableTracking,
        CommonWords,
        FrequentWords,
    )
}


def read_task(value: Any, *, source: str) -> Task:
    """Make a task from ``KIND`` or ``{task: KIND, setting: value, ...}``.

    Raises
    ------
    InvalidConfigError
        If there is no such kind, or a setting is wrong; `source` begins the message.
    """
    settings = {"task": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise InvalidConfigError(f"{source}: expected KIND or {{task: KIND, setting: value}}, got {value!r}.")
    kind = settings["task"]
    if kind not in TASKS:
        near = difflib.get_close_matches(kind, TASKS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InvalidConfigError(f"{source}: no task named {kind!r}.{hint} Tasks: {', '.join(TASKS)}.")
    given = {key: setting for key, setting in settings.items() if key != "task"}
    if not all(isinstance(key, str) for key in given):
        raise InvalidConfigError(f"{source}: the names of settings must be words.")
    try:
        return TASKS[kind](**given)
    except ValidationError as error:
        known = list(TASKS[kind].model_fields)
        raise InvalidConfigError(explain_validation(error, path=source, known=known)) from None
