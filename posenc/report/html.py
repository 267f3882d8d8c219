"""The page as one HTML file that loads nothing: no script, no font and no image from elsewhere."""

from __future__ import annotations

import math
import re
from html import escape
from itertools import groupby

import numpy as np

from posenc.report.maps import colours
from posenc.report.sections import Block, Chart, Grid, Heat, Picture, Section

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 .8rem 3rem; max-width: 62rem; font: 1rem/1.5 system-ui, sans-serif; color: #1b1b1b;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
pre { white-space: pre-wrap; background: #f3f3f3; padding: .5rem .7rem; border-radius: .3rem; font-size: .85rem; }
nav a { display: inline-block; margin-right: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: normal;
  white-space: nowrap; }
.number { text-align: right; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; max-width: 11rem; white-space: normal; }
figure { margin: .6rem 0; } figure > svg { width: 100%; max-width: 34rem; height: auto; display: block; }
svg text { font: 10px system-ui, sans-serif; fill: #333; }
.grid { stroke: #e2e2e2; } .tick { stroke: #555; } .window { stroke: #555; stroke-dasharray: 1 3; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; }
.swatch { width: 26px; height: 10px; margin-right: .3rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.tiles.small { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tiles h4 { margin: 0 0 .2rem; font-size: .88rem; } .tiles img { width: 100%; height: auto; image-rendering: pixelated;
  border: 1px solid #ccc; } .tiles p { margin: .1rem 0; font-size: .75rem; }
.heat td { text-align: center; border: 1px solid #fff; padding: .2rem .3rem; font-size: .74rem; line-height: 1.15; }
.heat small { display: block; font-size: .66rem; }
"""
_STRONG = re.compile(r"\*\*(.+?)\*\*")
"""Text that Markdown prints bold."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, introduction: str, sections: list[Section]) -> str:
    """The whole file."""
    body = [f"<h1>{escape(title)}</h1><p>{escape(introduction)}</p>", _contents(sections)]
    body += [_section(number, section) for number, section in enumerate(sections)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _contents(sections: list[Section]) -> str:
    links = "".join(f'<a href="#s{number}">{escape(s.title)}</a>' for number, s in enumerate(sections))
    return f"<nav>{links}</nav>"


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{escape(section.title)}</h2><pre>{escape(section.command)}</pre>']
    parts += ["<p>" + _STRONG.sub(r"<strong>\1</strong>", escape(remark)) + "</p>" for remark in section.remarks]
    for kind, blocks in groupby(section.blocks, type):
        parts.append(_group(kind, list(blocks)))
    return "".join(parts) + "</section>"


def _group(kind: type[Block], blocks: list[Block]) -> str:
    if kind is Heat:
        every = [block for block in blocks if isinstance(block, Heat)]
        tasks = groupby(every, lambda heat: heat.table.task)
        return "".join(
            f"<h3>{escape(task)}: share right by depth and length</h3>"
            f'<div class="tiles">{"".join(_heat(heat) for heat in heats)}</div>'
            for task, heats in tasks
        )
    if kind is Picture:
        pictures = "".join(_picture(block) for block in blocks if isinstance(block, Picture))
        return (
            "<h3>Position maps: which distance a query (row) sees a key (column) at</h3>"
            "<p>Dark is near, yellow is the window, grey is beyond it, white is not attended.</p>"
            f'<div class="tiles small">{pictures}</div>'
        )
    if kind is Chart and len(blocks) > 1:
        return f'<div class="tiles">{"".join(_block(block) for block in blocks)}</div>'
    return "".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    if isinstance(block, Chart):
        return block.svg
    assert isinstance(block, Grid)
    sides = [' class="number"' if column >= block.numbers else "" for column in range(len(block.columns))]
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(block.columns, sides, strict=True))
    rows = []
    for row in block.rows:
        cells = "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row[1:], sides[1:], strict=True))
        rows.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h3>{escape(block.title)}</h3><div class="scroll">{table}</div>'


def _heat(heat: Heat) -> str:
    table = heat.table
    head = "".join(f"<th>{length}</th>" for length in table.lengths)
    rows = []
    for depth, scores in table.rows.items():
        cells = "".join(_heat_cell(None if s is None else s.value, math.nan if s is None else s.error) for s in scores)
        rows.append(f'<tr><th scope="row">{depth:g}</th>{cells}</tr>')
    return (
        f'<div><h4>{escape(table.label)}</h4><div class="scroll"><table class="heat">'
        f"<thead><tr><th>depth</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _heat_cell(value: float | None, error: float) -> str:
    if value is None or not math.isfinite(value):
        return "<td>-</td>"
    red, green, blue = (int(channel) for channel in colours(np.clip(value, 0, 1)))
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "#fff"
    small = f"<small>± {error:.2f}</small>" if math.isfinite(error) else ""
    return f'<td style="background:rgb({red},{green},{blue});color:{ink}">{value:.2f}{small}</td>'


def _picture(picture: Picture) -> str:
    name = escape(picture.title)
    image = f'<img src="{picture.address}" alt="position map of {name}">'
    return f"<div><h4>{name}</h4>{image}<p>{escape(picture.caption)}</p></div>"
