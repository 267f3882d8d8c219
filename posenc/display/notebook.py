"""HTML of plans, handles and tables of plugins in a notebook (``_repr_html_``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from posenc.display import viz
from posenc.display.explain import explain
from posenc.errors import PosencError
from posenc.plan import PositionPlan


def plan_html(plan: PositionPlan) -> str:
    """Show the picture and the explanation of a plan; without matplotlib, the text says how to install it."""
    try:
        source = viz.data_uri(viz.plan_figure(plan))
        picture = f'<img style="max-width: 100%" alt="{escape(viz.title(plan))}" src="{source}">'
    except PosencError as error:
        picture = f"<p>{escape(str(error))}</p>"
    return f"<div>{picture}<pre>{escape(explain(plan))}</pre></div>"


def handle_html(described: Mapping[str, Any]) -> str:
    """Show what is applied to which model, from :meth:`Handle.describe`."""
    return table_html(["", ""], ((key, _text(value)) for key, value in described.items()), header=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value))
    return str(value)


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]], *, header: bool = True) -> str:
    """A table, such as :meth:`posenc.registry.Registry.table`."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(columns, 'th')}</thead>" if header else ""
    return f"<div><table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"
