"""How plans, handles and tables of plugins show themselves in a notebook (``_repr_html_``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from posenc.errors import PosencError

if TYPE_CHECKING:
    from posenc.plan import PositionPlan
    from posenc.registry import Registry


def plan_html(plan: PositionPlan) -> str:
    """A plan as its picture and its explanation; without matplotlib it says how to get the picture."""
    from posenc.display import viz

    try:
        shown = (
            f'<img style="max-width: 100%" alt="{escape(viz.title(plan))}" src="{viz.data_uri(viz.plan_figure(plan))}">'
        )
    except PosencError as error:
        shown = f"<p>{escape(str(error))}</p>"
    return f"<div>{shown}<pre>{escape(plan.explain())}</pre></div>"


def handle_html(described: Mapping[str, Any]) -> str:
    """What is applied to what, from :meth:`Handle.describe`."""
    return _table(["", ""], ((key, _shown(value)) for key, value in described.items()), header=False)


def registry_html(registry: Registry[Any]) -> str:
    """The plugins of one seam."""
    from posenc.display.listing import listing

    return _table(*listing(registry))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    return str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, header: bool = True) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(columns, 'th')}</thead>" if header else ""
    return f"<div><table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table></div>"
