"""What holds the pictures of the internals to the code."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import posenc
from posenc.kernels.cpu.calls import flash_calls
from posenc.kernels.cpu.decode_calls import decode_calls
from posenc.kernels.rotated import rotation_layout
from posenc.kernels.triton.requests import decode_tables
from posenc.kernels.windowed.bands import band_schedule
from tests.docs.collect import ROOT


def named_paths(text: str) -> list[str]:
    """Files and folders of the code that a text names."""
    return re.findall(r"\b(?:posenc|plugins|adapters)/[\w/]+(?:\.\w+)?", text)


def seams(shown: str, _: pytest.MonkeyPatch) -> None:
    """The picture of the design names what is there."""
    paths = named_paths(shown)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def layers(shown: str, _: pytest.MonkeyPatch) -> None:
    """The picture of a forward names what is there."""
    paths = named_paths(shown)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


CELL = 128
"""Queries and keys of a cell in the pictures of a plan's calls."""


def cells(shown: str) -> dict[int, list[str]]:
    """The rows of such a picture: first query, and the calls in every cell."""
    rows = re.findall(r"^ +(\d+) {2,}(\S.*)$", shown.split("\n\n")[1], re.MULTILINE)
    return {int(query): row.split() for query, row in rows}


def cut(calls: list[tuple[str, Any, Any, Any]], total: int) -> dict[int, list[str]]:
    """What the picture shows of calls, given as (sign, queries, keys, which of these pairs)."""
    rows = {}
    for query in range(0, total, CELL):
        row = []
        for key in range(0, query + 1, CELL):
            signs = [
                sign
                for sign, queries, keys, inside in calls
                if inside[(queries >= query) & (queries < query + CELL)][:, (keys >= key) & (keys < key + CELL)].any()
            ]
            row.append("\\".join(dict.fromkeys(signs)))
        rows[query] = row
    return rows


def cpu_calls(shown: str, _: pytest.MonkeyPatch) -> None:
    """Every cell of the picture holds the calls of the plan."""
    plan = posenc.strategy("self_extend", window=1024, group=4, window_size=256).plan(1024)
    copies, planned = rotation_layout(plan, 1024).queries, flash_calls(plan, 1024)
    calls, kinds = [], []
    for copy, segment_calls in zip(copies, planned.by_segment, strict=True):
        for one in segment_calls:
            tile = one.tile
            size = (tile.rows[1] - tile.rows[0], tile.keys[1] - tile.keys[0])
            sign = {"lower": "L", "masked": "b"}.get(tile.kind) or str([CELL, 2 * CELL, 4 * CELL].index(size[1]) + 1)
            kinds.append((sign, copy.segment.name, tile.count, size))
            inside = torch.ones(size).tril() if tile.kind == "lower" else torch.ones(size)
            inside = inside if one.mask is None else one.mask[0, 0]
            for block in range(tile.count):
                shift = block * tile.step
                queries = torch.arange(*tile.rows) + shift + one.row_offset
                calls.append((sign, queries, torch.arange(*tile.keys) + shift + one.key_offset, inside > 0))
    calls.sort(key=lambda call: call[0] == "b")
    assert cells(shown) == cut(calls, 1024)
    assert [kind for kind in kinds if kind[0] == "L"] == [
        ("L", "neighbour", int(re.findall(r"(\d+) of the segment neighbour", shown)[0]), (CELL, CELL)),
        ("L", "grouped", int(re.findall(r"(\d+) of the segment grouped", shown)[0]), (CELL, CELL)),
    ]
    (band,) = (kind for kind in kinds if kind[0] == "b")
    numbers = re.findall(r"(\d+) blocks of a band: (\d+) queries against (\d+) keys", shown)
    assert numbers == [(str(band[2]), *map(str, band[3]))]


def windowed_calls(shown: str, _: pytest.MonkeyPatch) -> None:
    """The picture's calls and merges are those of the plan."""
    plan = posenc.strategy("self_extend", window=1024, group=4, window_size=256).plan(1024)
    planned, calls, lines = band_schedule(plan, 1024), [], []
    for sign, one in zip("ng", planned.calls, strict=True):
        queries, keys = (torch.arange(span.start, span.stop) for span in (one.rows, one.values))
        band, offset = one.band, len(keys) - len(queries)
        distance = torch.arange(len(queries))[:, None] + offset - torch.arange(len(keys))
        inside = (distance >= 0) & (distance <= (len(keys) if band.left is None else band.left))
        calls.append((sign, queries, keys, inside))
        seen = "causal" if band.left is None else f"window left={band.left}, right={band.right}"
        spans = [f"{name} {x[0]} to {x[-1]}" for name, x in (("queries", queries), ("keys", keys))]
        lines.append(f" {sign}      1 call: {', '.join(spans)}, {seen}")
    calls.reverse()
    assert cells(shown) == cut(calls, 1024)
    merged = [
        f"queries {rows.start} to {rows.stop - 1} from {' and '.join('ng'[n] for n in numbers)}"
        for rows, numbers in planned.merges
    ]
    assert shown.split("\n\n")[2].strip("\n").splitlines() == [*lines, f" merge  {'; '.join(merged)}"]


def decoded(shown: str) -> tuple[Any, list[int]]:
    """The plan of the pictures of one decoded token, and the borders of its segments in the order of their keys."""
    assert "lampe (window 2048) after a prompt of 8192" in shown
    plan = posenc.strategy("lampe", window=2048).plan(8192, 8193)
    edges = sorted({int(bound[-1]) for segment in plan.segments for bound in (segment.key_start, segment.key_stop)})
    return plan, edges


def one_query(shown: str, patch: pytest.MonkeyPatch) -> None:
    """Which segments one call reads, and how it is split."""
    plan, edges = decoded(shown)
    by_key = sorted(plan.segments, key=lambda segment: int(segment.key_start[-1]))
    lines = {line.split()[0]: line for line in shown.split("\n\n")[1].splitlines() if line.strip()}
    assert [int(x) for x in re.findall(r"\d+", lines["keys"])] == edges
    assert re.findall(r"\w+", lines["|"]) == [segment.name for segment in by_key]
    patch.setattr(torch, "get_num_threads", lambda: 2)
    q, k = torch.zeros(1, 9, 1, 64), torch.zeros(1, 3, 8193, 64)
    planned = decode_calls(plan, posenc.Rotary.from_theta(1e4, 64), q, k, 1.0)
    (frame,), (call,) = planned.frames, planned.calls
    assert (frame.copy.segment.name, len(frame.before), len(frame.after)) == ("middle", edges[1], edges[3] - edges[2])
    assert (call.length, call.num_splits) == (edges[3], 2)
    assert lines["role"].split()[1:] == ["neighbour", "primary", "neighbour"]
    length = call.bias.shape[-1]
    spans = [(start, start + length - 1) for start in range(0, edges[3] - length + 1, edges[3] // 2)]
    assert re.findall(r"keys (\d+) to (\d+)", lines["read"]) == [(str(low), str(high)) for low, high in spans]


def end_to_end(shown: str, _: pytest.MonkeyPatch) -> None:
    """Where the decode kernel lays the keys of every segment, and where its splits begin."""
    plan, _edges = decoded(shown)
    tables = decode_tables([plan], [1], posenc.Rotary.from_theta(1e4, 64), torch.device("cpu"))
    laid, names, keys, _splits, starts = shown.split("\n\n")[1].splitlines()[:5]
    places = tables.segments_S8[:, :3].tolist()
    assert [int(x) for x in re.findall(r"\d+", laid)] == [*(place for *_, place in places), tables.keys[0]]
    assert re.findall(r"\w+", names) == [segment.name for segment in plan.segments]
    assert [int(x) for x in re.findall(r"\d+", keys)] == [first for first, *_ in places]
    split = math.ceil(math.ceil(tables.keys[0] / 4) / 64) * 64
    assert [int(x) for x in re.findall(r"\d+", starts)] == [*range(0, tables.keys[0], split), tables.keys[0]]
