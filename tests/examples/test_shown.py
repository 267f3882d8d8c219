"""Plans, handles and tables render in a notebook."""

from __future__ import annotations

import sys
from html import escape, unescape
from html.parser import HTMLParser

import pytest

import posenc
from tests.hf import tiny


class Tags(HTMLParser):
    """Counts open elements, and fails if one is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_plan_shows_its_picture_and_its_explanation() -> None:
    plan = posenc.strategy("rerope", window=64, window_size=8).plan(100)
    shown = plan._repr_html_()
    assert "img" in Tags(shown).seen
    assert plan.explain() in unescape(shown)


def test_a_plan_without_matplotlib_says_how_to_get_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = posenc.strategy("rope").plan(10)._repr_html_()
    assert "img" not in Tags(shown).seen
    assert "pip install 'posenc[plot]'" in unescape(shown)


def test_a_handle_shows_the_applied_strategy() -> None:
    model = tiny.make("llama")
    with posenc.apply(model, "rerope", window_size=12) as handle:
        shown = unescape(handle._repr_html_())
    Tags(handle._repr_html_())
    for part in ("LlamaForCausalLM", "name: rerope, window_size: 12", handle.layers()[0], "rotated"):
        assert part in shown
    assert "<td>active</td><td>True</td>" in shown
    assert "<td>active</td><td>False</td>" in handle._repr_html_()


@pytest.mark.parametrize("seam", ["strategies", "adapters", "backends"])
def test_tables_list_everything_installed(seam: str) -> None:
    registry = getattr(posenc, seam)()
    shown = registry._repr_html_()
    assert Tags(shown).seen.count("tr") == len(registry) + 1
    for name, info in registry.items():
        assert f"<td>{name}</td>" in shown
        assert escape(info.summary) in shown
