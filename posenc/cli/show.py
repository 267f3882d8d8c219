"""``posenc show NAME``: one strategy in full."""

from __future__ import annotations

import types
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from posenc.cli._output import json_option, print_json, print_table

if TYPE_CHECKING:
    from posenc.registry import StrategyInfo


@click.command("show", short_help="Show one strategy in full.")
@click.argument("name")
@json_option
def command(name: str, as_json: bool) -> None:
    """Show the paper, capabilities and parameters of strategy NAME."""
    from posenc.plugins import strategies

    info = strategies()[name]
    data = describe(info)
    if as_json:
        print_json(data)
        return
    click.echo(f"{info.name}: {info.summary}")
    click.echo(f"paper:        {info.paper}")
    click.echo(f"kind:         {data['kind']}")
    click.echo(f"distribution: {info.distribution}")
    click.echo(f"capabilities: {', '.join(key for key, value in data['capabilities'].items() if value) or 'none'}")
    if not data["params"]:
        click.echo("parameters:   none")
        return
    click.echo()
    rows = [[param["name"], param["type"], _default(param), param["description"]] for param in data["params"]]
    print_table("parameters", ["name", "type", "default", "description"], rows)


def describe(info: StrategyInfo) -> dict[str, Any]:
    """Describe a strategy as plain data."""
    return {
        "name": info.name,
        "kind": info.kind,
        "summary": info.summary,
        "paper": info.paper,
        "distribution": info.distribution,
        "capabilities": asdict(info.capabilities),
        "params": [_describe_field(key, field) for key, field in info.params.model_fields.items()],
    }


def _describe_field(name: str, field: Any) -> dict[str, Any]:
    required = field.is_required()
    return {
        "name": name,
        "type": _type_name(field.annotation),
        "required": required,
        "default": None if required else field.get_default(call_default_factory=True),
        "description": field.description or "",
    }


def _type_name(annotation: Any) -> str:
    """Write a type as in source code, such as ``int | None``, without the constraints that pydantic attaches."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if annotation is type(None):
        return "None"
    if parts:
        inner = ", ".join("..." if part is Ellipsis else _type_name(part) for part in parts)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(param: dict[str, Any]) -> str:
    if param["required"]:
        return "required"
    return "none" if param["default"] is None else str(param["default"])
