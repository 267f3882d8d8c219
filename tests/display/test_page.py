"""The page of posenc explore without a browser: its controls, its content and its refusals."""

from __future__ import annotations

import re
import socket
import sys
from html import unescape
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from click.testing import CliRunner, Result
from pydantic import Field, PositiveInt

import posenc
from posenc.cli._group import group
from posenc.display.cost import cost
from posenc.display.explore.app import make_app
from posenc.display.explore.controls import controls, read
from posenc.params import Params

PROFILE = Path(posenc.__file__).parent / "profiles" / "tiny.yaml"


@pytest.fixture(scope="module")
def client() -> Any:
    return make_app(name="rerope", window=256, prompt=1024).test_client()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def shown(client: Any, **entries: Any) -> str:
    return unescape(client.get("/", query_string=entries).get_data(as_text=True))


def test_controls_follow_the_types_of_the_model() -> None:
    class Mixed(Params):
        count: int | None = Field(None, description="how many")
        share: float = 0.25
        exact: bool = True
        kind: Literal["auto", "never"] | PositiveInt = "auto"
        many: tuple[int, ...] = (1, 2)

    by_name = {control.name: control for control in controls(Mixed)}
    assert (by_name["count"].kind, by_name["count"].whole, by_name["count"].hint) == ("number", True, "how many")
    assert (by_name["share"].kind, by_name["share"].whole, by_name["share"].default) == ("number", False, "0.25")
    assert (by_name["exact"].kind, by_name["exact"].options) == ("choice", ("true", "false"))
    assert (by_name["kind"].kind, by_name["kind"].options) == ("text", ("auto", "never"))
    assert (by_name["many"].kind, by_name["many"].default) == ("text", "[1, 2]")
    assert read({"count": " 3 ", "share": "", "exact": "false", "many": "[4]"}, Mixed) == {
        "count": 3,
        "exact": False,
        "many": [4],
    }


@pytest.mark.parametrize("name", sorted(posenc.strategies()))
def test_every_strategy_has_its_controls(client: Any, name: str) -> None:
    needed = {"calibration": str(PROFILE)} if name == "auto" else {}
    page = shown(client, strategy=name, window=256, prompt=600, **needed)
    for key in posenc.strategies()[name].params.model_fields:
        assert re.search(rf'<(select|input) id="p-{key}" name="{key}"', page)
    assert page.count("data:image/png;base64,") == 2
    assert f'<option value="{name}" selected>' in page


def test_the_page_shows_the_plan(client: Any) -> None:
    page = shown(client, strategy="self_extend", window=256, prompt=4096, group=4, window_size=64)
    plan = posenc.strategy("self_extend", window=256, group=4, window_size=64).plan(4096)
    leaves = int((plan.reach >= 256).argmax())
    assert f"leaves the window of 256 from token {leaves} on" in page
    assert f"Largest relative position {plan.max_relative:g}" in page
    for row in cost(plan).segments:
        assert f"{row.pairs:,}" in page
    assert plan.explain() in page


def test_the_yaml_describes_the_shown_strategy(client: Any, tmp_path: Path) -> None:
    entries = {"head": 16, "mapping": "{c: 192, a: 0.003, b: -2.5}", "continuity": "false", "replan": "never"}
    page = shown(client, strategy="lampe", window=256, prompt=1024, **entries)
    text = re.search(r'<pre id="yaml".*?>(.*?)</pre>', page, re.DOTALL)
    assert text is not None
    (tmp_path / "posenc.yaml").write_text(text[1], encoding="utf-8")
    strategy = posenc.load_config(tmp_path / "posenc.yaml").make(256)
    given = {key: yaml.safe_load(str(value)) for key, value in entries.items()}
    assert strategy.fingerprint == posenc.strategy("lampe", window=256, **given).fingerprint


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"strategy": "reropee"}, "Did you mean 'rerope'?"),
        ({"strategy": "rerope", "window": "x", "prompt": "8"}, "window must be a whole number of tokens, got 'x'."),
        ({"strategy": "rerope", "window": "8", "prompt": "0"}, "prompt must be at least 1 token, got 0."),
        ({"strategy": "rerope", "window": "8", "prompt": "9999999"}, "prompt must be at most 1048576 tokens here"),
        ({"strategy": "self_extend", "window": "8", "prompt": "9", "group": "0"}, "self_extend.group: "),
        ({"strategy": "lampe", "window": "8", "prompt": "9", "mapping": "{c: 1"}, "mapping: '{c: 1' is not valid"),
        ({"strategy": "rope", "window": "8", "prompt": "9", "replan": "<script>"}, "rope.replan"),
    ],
)
def test_bad_input_is_a_message_on_the_page(client: Any, entries: dict[str, str], said: str) -> None:
    answer = client.get("/", query_string=entries)
    assert answer.status_code == 400
    text = answer.get_data(as_text=True)
    assert '<p class="error" role="alert">' in text
    assert said in unescape(text)
    assert "Traceback" not in text
    assert "<script>" not in text


def test_other_hosts_and_origins_are_refused(client: Any) -> None:
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
    policy = client.get("/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")
    page = shown(client)
    assert not re.findall(r'(?:src|href|action)="(?!/|data:|#)', page)


def test_cost_counts_pairs_and_copies() -> None:
    plain = cost(posenc.strategy("rope").plan(100))
    assert (plain.pairs, plain.causal_pairs, plain.key_copies, plain.copied_keys) == (5050, 5050, 1, 100)
    plan = posenc.strategy("lm_infinite", window_size=10, sinks=2).plan(100)
    bounded = cost(plan)
    attended = ~(plan.relative_positions() != plan.relative_positions())
    assert bounded.pairs == attended.sum() < bounded.causal_pairs
    assert sum(row.pairs for row in bounded.segments) == bounded.pairs
    assert cost(posenc.strategy("self_extend", window=64).plan(100)).key_copies == 2


def test_without_the_extra_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask", None)
    result = run("explore", "--no-browser")
    assert result.exit_code == 2
    assert result.stderr == (
        "posenc: posenc explore needs flask, which is not installed. Run: pip install 'posenc[explore]'\n"
    )


def test_a_port_in_use_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("explore", "--no-browser", "--port", port)
    assert result.exit_code == 2
    assert f"port {port} cannot be used (Address already in use). Choose another one with --port." in result.stderr


def test_an_unknown_strategy_is_refused_before_anything_is_served() -> None:
    result = run("explore", "--no-browser", "--strategy", "lampee")
    assert result.exit_code == 2
    assert "Did you mean 'lampe'?" in result.stderr


def test_colours_differ_in_lightness_and_lines_in_dashes() -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    from posenc.display import viz

    plan = posenc.strategy("rerope", window=64, window_size=8).plan(100)
    axis = viz.new_figure(4, 3).subplots()
    viz.draw_map(axis, plan, title="", bar=False)
    shades = axis.images[0].get_cmap()(np.linspace(0, 1, 64))[:, :3]
    assert (np.diff(shades @ [0.2126, 0.7152, 0.0722]) > 0).all()
    axis = viz.new_figure(4, 3).subplots()
    viz.draw_curve(axis, plan)
    styles = {(line.get_linestyle(), line.get_linewidth()) for line in axis.lines}
    assert len(styles) == len(axis.lines) == 4
    light = sorted(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in viz.COLOURS[:2])
    assert light[1] - light[0] > 0.03
