"""The page has every number with its error and its command, loads nothing, and names damaged results."""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import operator
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posenc
from posenc.bench.results import save
from posenc.errors import InvalidConfigError, InvalidInputError, PosencError
from posenc.report.costs import cost_tables, title_of, what_is_compared
from posenc.report.curves import read_calibration
from posenc.report.maps import BEYOND, NOTHING, colours, map_address, png
from posenc.report.sources import collect
from posenc.report.svg import ChartPoint, line_chart, style, ticks
from posenc.report.tables import depth_tables, pair_tables, ratio_tables, score_tables, with_error
from posenc.report.write import write_report
from tests.bench.conftest import result, row
from tests.report import results


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, str]:
    """HTML and Markdown of made-up results."""
    pages = write_report([results.write_all(tmp_path)], tmp_path / "out", title="A & B")
    return pages[0].read_text(encoding="utf-8"), pages[1].read_text(encoding="utf-8")


def test_scores_are_means_over_documents_with_their_errors():
    losses, answers = score_tables(results.sweep())
    value = losses.rows["rope"][1]
    assert value is not None
    assert value.value == pytest.approx(math.exp(5.15))
    assert value.error == pytest.approx(math.exp(5.15) * np.std([5.0, 5.1, 5.2, 5.3], ddof=1) / 2)
    assert (losses.lengths, value.documents) == ((256, 1024), 4)
    best = answers.rows["lampe"][1]
    assert best is not None
    assert (best.value, best.error) == (pytest.approx(0.8), pytest.approx(0))


def test_ratios_are_paired():
    (table,) = ratio_tables(results.sweep())
    rope = table.rows["rope"][1]
    assert rope is not None
    assert rope.value == pytest.approx(math.exp(1.9))
    assert rope.error == pytest.approx(0, abs=1e-12)  # every document's difference is the same
    assert [scores[1].value for scores in table.rows.values() if scores[1]][1] == 1.0


def test_a_strategy_is_compared_with_the_one_that_its_suite_names():
    sweep = results.sweep()
    losses, answers = pair_tables(sweep)
    assert list(losses.rows) == list(answers.rows) == ["lampe + yarn, against lampe"]
    ratio, share = losses.rows["lampe + yarn, against lampe"][1], answers.rows["lampe + yarn, against lampe"][1]
    assert ratio is not None
    assert share is not None
    assert (ratio.value, ratio.error) == (pytest.approx(math.exp(0.1)), pytest.approx(0, abs=1e-12))
    assert (share.value, share.error) == (pytest.approx(-0.1), pytest.approx(0, abs=1e-12))
    fewer = [
        cell.model_copy(update={"samples": cell.samples[:3]}) if cell.samples and cell.label == "lampe" else cell
        for cell in sweep.cells
    ]
    assert set(pair_tables(results.sweep(cells=tuple(fewer)))[0].rows.values()) == {(None, None)}


def test_depths_are_kept_apart_and_a_missing_cell_is_a_gap():
    whole = results.sweep()
    cells = tuple(
        cell.model_copy(update={"samples": None}) if (cell.label, cell.length) == ("rope", 256) else cell
        for cell in whole.cells
    )
    sweep = results.sweep(cells=cells)
    assert sweep.missing == 2
    rope = next(table for table in depth_tables(sweep) if table.label == "rope")
    assert rope.rows[0.1][0] is None
    score = rope.rows[0.9][1]
    assert score is not None
    assert score.value == 0.0


def test_seeds_are_pooled():
    sweep = results.sweep()
    more = [cell.model_copy(update={"seed": 1, "id": f"{cell.id}x"}) for cell in sweep.cells]
    score = score_tables(results.sweep(cells=(*sweep.cells, *more)))[0].rows["lampe"][0]
    assert score is not None
    assert score.documents == 8


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (12.345, 0.678, "12.35 ± 0.68"),
        (1.0012, 0.0023, "1.001 ± 0.002"),
        (0.5, math.nan, "0.50"),
        (math.inf, 1, "-"),
        (math.nan, math.nan, "-"),
        (1.0, 0.0, "1.00 ± 0.00"),
    ],
)
def test_numbers_are_rounded_to_their_errors(value: float, error: float, shown: str):
    assert with_error(value, error) == shown


def test_both_pages_contain_every_number_and_command(page: tuple[str, str]):
    for text in page:
        assert "posenc eval made-up.yaml" in text
        assert "posenc calibrate tiny --text novel.txt --json" in text
        assert "posenc bench attention --lengths 4096" in text
        for tables in (score_tables(results.sweep()), ratio_tables(results.sweep()), pair_tables(results.sweep())):
            for table in tables:
                for scores in table.rows.values():
                    assert all(score is not None and score.shown in text for score in scores)
        assert "Lowest perplexity: rope at 256 tokens; lampe at 256, 1024 tokens." in text
        assert "20.09 ± 1.00" in text  # the calibration's choice
        assert "lampe: head 64, U(l) = 180.999 / (1 + exp(-(0.001 l + 0.5)))" in html.unescape(text)
        assert "1.25 (1.10 .. 1.50)" in text  # the benchmark's ratio


class Outside(HTMLParser):
    """Records every address that a page requests, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_makes_no_request(page: tuple[str, str]):
    html = page[0]
    reader = Outside()
    reader.feed(html)
    assert not reader.open
    assert all(address.startswith(("#s", "data:image/png;base64,")) for address in reader.addresses)
    assert sum(address.startswith("data:") for address in reader.addresses) == len(results.STRATEGIES)
    assert not {"script", "link", "iframe", "object", "form"} & reader.tags
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src &#x27;none&#x27;" in html
    assert '<meta name="viewport" content="width=device-width' in html


def test_text_from_users_is_escaped(tmp_path: Path):
    sweep = results.sweep(name="<script>alert(1)</script>", command="posenc eval 'a<b>.yaml'")
    from posenc.evaluate.sweep.results import write_sweep

    html, _ = write_report([write_sweep(sweep, tmp_path / "a.json")], tmp_path)
    assert "<script>" not in html.read_text()
    assert "a&lt;b&gt;.yaml" in html.read_text()


def test_a_chart_is_well_formed_and_has_every_point():
    series = {
        f"line {n}": [ChartPoint(256, 2.0 + n, 0.1), ChartPoint(512, math.nan, 0.1), ChartPoint(1024, 3.0 + n, 0.2)]
        for n in range(9)
    }
    chart = line_chart(series, title="a < b", x_label="x", y_label="y", log_y=True, window=256)
    figure = ET.fromstring(chart)
    svg = figure.find("svg")
    assert svg is not None
    assert len(svg.findall("polyline")) == 9
    assert len(svg.findall("path")) == 18
    assert len({style(number) for number in range(100)}) == 100
    spans = figure.findall("figcaption/span")
    assert ["".join(span.itertext()) for span in spans] == list(series)
    assert line_chart({"a": [ChartPoint(1, math.nan, 0)]}, title="", x_label="", y_label="") == ""


def test_higher_values_are_higher_up():
    chart = line_chart({"a": [ChartPoint(1, 1.0, 0), ChartPoint(2, 9.0, 0)]}, title="t", x_label="x", y_label="y")
    line = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert line is not None
    x0, y0, x1, y1 = map(float, line.groups())
    assert x0 < x1
    assert y0 > y1


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (3.1, 3.4, False), (8, 450, True), (8.9, 9.1, True)])
def test_ticks_are_few_and_inside_the_range(low: float, high: float, log: bool):
    values = ticks(low, high, log=log)
    assert 2 <= len(values) <= 10
    assert all(low <= tick <= high for tick in values)


def test_a_map_shows_the_plan():
    plan = posenc.strategy("rope", window=256).plan(1000)
    data = base64.b64decode(map_address(plan, 256).partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(data[start : start + size]), np.uint8).reshape(height, 1 + 3 * width)
    pixels = rows[:, 1:].reshape(height, width, 3)
    assert tuple(pixels[0, -1]) == NOTHING  # a key after the query
    assert tuple(pixels[-1, 0]) == BEYOND  # a distance of 999
    assert tuple(pixels[-1, -1]) == tuple(colours(0.0))
    assert png(pixels) == data


def test_lightness_grows_along_the_scale():
    scale = colours(np.linspace(0, 1, 20)) @ np.array([0.3, 0.59, 0.11])
    assert (np.diff(scale) > 0).all()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"format": "posenc-eval", "version": 9}', "another version"),
        ("a.json", '{"format": "posenc-eval", "version": 1}', "damaged result"),
        ("a.yaml", "format: posenc-calibration\nversion: 1\n", "damaged calibration"),
        ("a.json", '{"format": "posenc-bench"}', "not a result of posenc bench"),
        ("a.json", '{"format": "other"}', "not a result of posenc eval, posenc calibrate or posenc bench"),
        ("a.json", "{", "not a result of posenc eval, posenc calibrate or posenc bench"),
        ("a.yaml", "a: [", "not a result of posenc eval, posenc calibrate or posenc bench"),
    ],
)
def test_files_that_are_not_results_are_refused(name: str, content: str, said: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(PosencError, match=said):
        collect([tmp_path / name])


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("calibration", "version"), 2, "version 2; this posenc reads 1"),
        (("sweeps", "lampe", "1024", 0, "losses"), "none", r"damaged calibration file \(sweeps.lampe.1024.0.losses"),
        (("sweeps", "lampe", "1024"), [], r"sweeps.lampe.1024: no candidate has a loss for every document"),
    ],
    ids=str,
)
def test_a_calibration_that_is_damaged_or_of_another_version_is_refused(
    keys: tuple[Any, ...], value: Any, said: str, tmp_path: Path
):
    changed = json.loads(json.dumps(results.CALIBRATION))
    *path, last = keys
    functools.reduce(operator.getitem, path, changed)[last] = value
    (tmp_path / "c.json").write_text(json.dumps(changed))
    with pytest.raises(InvalidConfigError, match=said):
        collect([tmp_path])


def test_v_curves_are_paired_with_the_best_candidate(tmp_path: Path):
    (tmp_path / "c.json").write_text(json.dumps(results.CALIBRATION))
    calibration = read_calibration(tmp_path / "c.json")
    (curve,) = calibration.curves
    assert (curve.strategy, curve.length, curve.parameter, list(curve.lines)) == ("lampe", 1024, "mapping", ["head 64"])
    first, best, dropped = curve.lines["head 64"]
    assert (first.x, first.y, first.error) == (64, pytest.approx(3.2), pytest.approx(0, abs=1e-12))
    assert (best.x, best.y, best.error) == (128, pytest.approx(3.0), 0)
    assert (dropped.x, dropped.y) == (512, pytest.approx(3.0 + (1.0 + 1.4) / 2))  # over their two common documents
    assert dropped.error == pytest.approx(0.2)
    assert calibration.choices[0] == ["1024", "native", "", "", "148.41 ± 7.42", "181.27 ± 9.06"]
    assert calibration.choices[2][:4] == ["1024", "lampe, fitted curve", "head=64, curve", "1"]


def test_costs_are_a_row_per_strategy_and_a_column_per_length():
    rows = [row(strategy=name, length=at, memory=None) for name in ("lampe", "rerope") for at in (4096, 2048)]
    measured = result(*rows[:3], row(kind="decode", shape="smollm2-135m", threads=1))
    assert title_of(measured) == "costs: attention, decode, 9/3x64, smollm2-135m, 2048 to 4096 tokens"
    attention, decode, memory = cost_tables(measured)
    assert attention[1] == ["strategy", "shape", "dtype", "threads", "backend", "2048", "4096"]
    shown = "1.25 (1.10 .. 1.50)"
    assert [line[0] for line in attention[2]] == ["lampe", "rerope"]
    assert [line[5:] for line in attention[2]] == [[shown, shown], ["-", shown]]
    assert decode[2] == [["lampe", "smollm2-135m", "float32", "1", "auto", shown]]
    assert memory[2] == [["lampe", "smollm2-135m", "float32", "1", "auto", "1.50"]]
    assert len(what_is_compared(measured)) == 2


def test_a_busy_machine_is_printed_bold(tmp_path: Path):
    save(result(other_cores=1.0), tmp_path)
    html, markdown = (page.read_text(encoding="utf-8") for page in write_report([tmp_path], tmp_path / "out"))
    assert "<strong>The machine was busy with other work: do not trust these times.</strong>" in html
    assert "**The machine was busy" in markdown


def test_a_folder_without_results_is_refused(tmp_path: Path):
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="no results here"):
        collect([tmp_path])
    with pytest.raises(InvalidInputError, match="does not exist"):
        collect([tmp_path / "nowhere"])


def test_a_sweep_file_of_another_format_is_ignored_and_a_damaged_one_is_refused(tmp_path: Path):
    save(result(row()), tmp_path)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "sweep.json").write_text('{"format": "posenc-sweep"}')
    assert not collect([tmp_path]).sweeps
    (tmp_path / "tiles" / "sweep.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"tiles/sweep\.json"):
        collect([tmp_path])
