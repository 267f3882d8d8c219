"""The controls of the form, generated from the pydantic model of a strategy's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from posenc.errors import InvalidConfigError
from posenc.params import RemapParams


@dataclass(frozen=True)
class Control:
    """The control of one parameter.

    Parameters
    ----------
    name : str
        Name of the parameter.
    kind : {"choice", "number", "text"}
        Kind of the control.
    options : tuple of str
        Values to choose from; for ``"text"``, values to suggest.
    default : str
        The value of an empty control; empty if it is a share of the window.
    hint : str
        The parameter's description.
    whole : bool
        True for whole numbers only.
    """

    name: str
    kind: Literal["choice", "number", "text"]
    options: tuple[str, ...]
    default: str
    hint: str
    whole: bool = False


def controls(params: type[Any]) -> list[Control]:
    """Make one control per field of a parameter model: first the strategy's own fields, then those of every remap."""
    fields = sorted(params.model_fields.items(), key=lambda item: item[0] in RemapParams.model_fields)
    return [_control(name, field) for name, field in fields]


def _control(name: str, field: Any) -> Control:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    allowed = {value for value in _allowed(field.annotation) if value is not type(None)}
    types = {value for value in allowed if isinstance(value, type)}
    literals = tuple(_text(value) for value in sorted(allowed - types, key=str))
    kind: Literal["choice", "number", "text"] = "text"
    if types == {bool} and not literals:
        kind, literals = "choice", ("true", "false")
    elif literals and not types:
        kind = "choice"
    elif types and types <= {int, float} and not literals:
        kind = "number"
    return Control(
        name=name,
        kind=kind,
        options=literals,
        default="" if default is None else _text(default),
        hint=field.description or "",
        whole=kind == "number" and types == {int},
    )


def _allowed(annotation: Any) -> Iterator[Any]:
    """List the types that an annotation allows, and the values of its literals."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _allowed(parts[0])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _allowed(part)
    elif origin is Literal:
        yield from parts
    else:
        yield origin or annotation


def _text(value: Any) -> str:
    """Write a value as YAML on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(entries: Mapping[str, str], params: type[Any]) -> dict[str, Any]:
    """Read the parameters that are filled in; empty controls are left out.

    Raises
    ------
    InvalidConfigError
        If an entry is not YAML. The strategy itself checks the values.
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
