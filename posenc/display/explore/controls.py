"""Controls of a form, made from the pydantic model of a strategy's parameters."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from posenc.errors import InvalidConfigError
from posenc.params import RemapParams


@dataclass(frozen=True)
class Control:
    """One parameter as a form shows it.

    Parameters
    ----------
    name : str
        Of the parameter.
    kind : {"choice", "number", "text"}
        What the control is.
    options : tuple of str
        Values to choose from; for ``"text"`` values to suggest.
    default : str
        What an empty control stands for; empty where it is a share of the window.
    hint : str
        The parameter's description.
    whole : bool
        Whole numbers only.
    """

    name: str
    kind: Literal["choice", "number", "text"]
    options: tuple[str, ...]
    default: str
    hint: str
    whole: bool = False


def controls(params: type[Any]) -> list[Control]:
    """One control per field of a parameter model: those of the strategy itself, then those that every remap has."""
    own = sorted(params.model_fields.items(), key=lambda item: item[0] in RemapParams.model_fields)
    return [_control(name, field) for name, field in own]


def _control(name: str, field: Any) -> Control:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    shown = "" if default is None else _text(default)
    kinds = {kind for kind in _kinds(field.annotation) if kind is not type(None)}
    named = tuple(_text(kind) for kind in sorted(kinds - _types(kinds), key=str))
    plain = _types(kinds)
    if plain == {bool} and not named:
        return Control(name, "choice", ("true", "false"), shown, field.description or "")
    if named and not plain:
        return Control(name, "choice", named, shown, field.description or "")
    if plain and plain <= {int, float} and not named:
        return Control(name, "number", (), shown, field.description or "", whole=plain == {int})
    return Control(name, "text", named, shown, field.description or "")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, and the values of its literals."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(parts[0])
    elif origin in (Union, types.UnionType):
        for part in parts:
            yield from _kinds(part)
    elif origin is Literal:
        yield from parts
    else:
        yield origin or annotation


def _types(kinds: set[Any]) -> set[Any]:
    return {kind for kind in kinds if isinstance(kind, type)}


def _text(value: Any) -> str:
    """A value as people write it in YAML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(entries: Mapping[str, str], params: type[Any]) -> dict[str, Any]:
    """The parameters that somebody filled in; empty controls are left out.

    Raises
    ------
    InvalidConfigError
        If an entry is not YAML. Whether the value is allowed is for the strategy to say.
    """
    values = {}
    for name in params.model_fields:
        text = entries.get(name, "").strip()
        if text:
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise InvalidConfigError(f"{name}: {text!r} is not valid YAML.") from None
    return values
