"""Nothing lacks its page: strategies, hooks, public names, verbs, errors; and the site is made of what is there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml

import posenc
from posenc import errors, hookspecs
from posenc.cli._group import group
from scripts.docs import parts, sources

ROOT = parts.ROOT
DOCS = ROOT / "docs"
OURS = [name for name, info in posenc.strategies().items() if info.distribution == "posenc"]
POSITIONS = ("Idea", "Formula", "Position map", "Parameters", "Paper", "Measured", "Published code")
FREQUENCIES = ("Idea", "Formula", "Frequencies", "Parameters", "Paper", "Measured", "Published code")


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def sections(text: str, level: str = "##") -> dict[str, str]:
    """Return the heading and the text of every section."""
    pieces = re.split(rf"^{level} (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def nav_pages() -> list[str]:
    """Return every page that mkdocs.yml names."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def walk(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        assert not isinstance(children, str)
        return [page for child in children for page in walk(child)]  # type: ignore[union-attr]

    return walk(config["nav"])


@pytest.mark.parametrize("name", OURS)
def test_every_strategy_has_a_page(name: str) -> None:
    page = sections(read(f"strategies/{name}.md"))
    kind = FREQUENCIES if posenc.strategies()[name].capabilities.changes_frequencies else POSITIONS
    assert tuple(page) == kind
    assert 3 <= len(page["Idea"].strip().splitlines()) <= 5
    filled = {heading: parts.fill(text).strip() for heading, text in page.items()}
    assert all(filled.values())
    info = posenc.strategies()[name]
    assert all(f"| `{key}` |" in filled["Parameters"] for key in info.params.model_fields)
    assert info.paper in filled["Paper"]
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", filled["Measured"])
    assert len(numbers) >= (8 if name == "auto" else 10)
    assert ("`make calibrate`" if name == "auto" else "`posenc eval benchmarks/main.yaml`") in filled["Measured"]
    if "Position map" in page:
        assert re.search(rf"^posenc plan {name} .*--plot {name}\.png$", page["Position map"], re.MULTILINE)
    assert f"strategies/{name}.md" in nav_pages()


def test_every_hook_has_a_section() -> None:
    hooks = {name for name in vars(hookspecs) if name.startswith("posenc_register_")}
    assert len(hooks) == 4
    page = sections(read("hooks.md"))
    assert hooks <= set(page)
    for hook in hooks:
        assert f"def {hook}(register):" in page[hook]


def test_every_public_name_has_a_section() -> None:
    page = read("reference/api.md")
    named = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: (posenc\.\S+)$", page, re.MULTILINE)}
    named |= set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert named == {*posenc.__all__, *posenc.testing.__all__}


@pytest.mark.parametrize("contract", ["Strategy", "Adapter", "Backend"])
def test_every_check_of_a_contract_is_explained(contract: str) -> None:
    tests = {name for name in vars(getattr(posenc.testing, f"{contract}Contract")) if name.startswith("test_")}
    (page,) = (text for title, text in sections(read("testing.md")).items() if title.endswith(contract.lower()))
    assert set(re.findall(r"^\| `(test_\w+)`", page, re.MULTILINE)) == tests


@pytest.mark.parametrize("line", re.findall(r"^::: (\S+)$", read("reference/api.md"), re.MULTILINE))
def test_every_entry_of_the_reference_is_documented(line: str) -> None:
    module, name = line.rsplit(".", 1)
    entry = getattr(__import__(module, fromlist=[name]), name)
    assert entry.__doc__, f"{line} has no docstring"


def test_every_error_has_its_cause_and_fix() -> None:
    page = sections(read("errors.md"))
    kinds = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == "posenc.errors"
    }
    assert "CacheMismatchError" in kinds
    for path in (path for folder in ("posenc", "plugins", "adapters") for path in (ROOT / folder).rglob("*.py")):
        named = re.findall(r"^ *class (\w+)\((.+)\):", path.read_text(encoding="utf-8"), re.MULTILINE)
        kinds |= {name for name, bases in named if kinds & set(re.findall(r"\w+", bases))}
    assert set(page) == kinds
    for name in kinds:
        cause, fix = page[name].split("**Fix.**")
        assert cause.strip().startswith("**Cause.**")
        assert len(cause) > 60
        assert len(fix) > 40
        assert name in posenc.__all__


def test_every_verb_has_its_help_on_the_page() -> None:
    page = sections(parts.commands())
    context = click.Context(group)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        assert command is not None
        shown = page[f"posenc {verb}"]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert max(parameter.opts, key=len) in shown
        assert f"| `posenc {verb}" in read("command-line.md"), f"command-line.md does not name {verb}"
    assert "posenc new plugin" in page


def test_the_navigation_contains_every_page() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    shelf = {page for page in nav_pages() if page.startswith(sources.SHELF)}
    assert set(nav_pages()) - shelf == pages, "list new pages in mkdocs.yml"
    assert shelf <= set(sources.outside(sorted(DOCS.rglob("*.md")), ROOT))


def test_the_architecture_is_one_screen() -> None:
    assert len(read("architecture.md").splitlines()) <= 64


def test_the_architecture_leads_to_every_page_of_the_internals() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in (DOCS / "internals").glob("*.md")}
    assert {page for page in pages if f"]({page})" not in read("architecture.md")} == set()


def test_every_decision_is_dated_and_listed() -> None:
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\((.+)\) \|$", read("decisions/index.md"), re.MULTILINE)
    assert rows
    assert [date for date, *_ in rows] == sorted(date for date, *_ in rows)
    pages = {path.name for path in (DOCS / "decisions").glob("*.md")} - {"index.md"}
    assert {name for *_, name in rows} == pages
    for date, title, name in rows:
        page = read(f"decisions/{name}")
        assert page.startswith(f"# {title}\n\n**Date.** {date}\n")
        assert re.findall(r"^\*\*(\w+)\.\*\*", page, re.MULTILINE) == ["Date", "Context", "Decision", "Consequences"]


def test_a_page_with_an_unknown_part_is_refused() -> None:
    with pytest.raises(KeyError, match="no_such_part"):
        parts.fill("<!-- posenc: no_such_part lampe -->")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "docs/a.md": "[b](sub/b.md) [code](../examples/one.py#L3) [all](../examples) [more](../NEWS.md) [x](https://x.example)",
        "docs/sub/b.md": "[up](../../examples/one.py) [a](../a.md)\n\n```text\n[no](../../examples/one.py)\n```\n",
        "examples/one.py": "x = 1\n",
        "examples/two.toml": "y = 2\n",
        "NEWS.md": "[a](docs/a.md) [old](OLD.md)",
        "OLD.md": "[news](NEWS.md)",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_links_that_leave_docs_lead_to_pages_of_the_site(tree: Path) -> None:
    page, below = tree / "docs" / "a.md", tree / "docs" / "sub" / "b.md"
    assert sources.rewrite(page.read_text(), page, tree) == (
        "[b](sub/b.md) [code](source/examples/one.py.md#L3) [all](source/examples.md) [more](source/NEWS.md) "
        "[x](https://x.example)"
    )
    assert sources.rewrite(below.read_text(), below, tree) == (
        "[up](../source/examples/one.py.md) [a](../a.md)\n\n```text\n[no](../../examples/one.py)\n```\n"
    )
    texts = sources.outside([page, below], tree)
    assert set(texts) == {"source/examples/one.py.md", "source/examples.md", "source/NEWS.md", "source/OLD.md"}
    assert texts["source/NEWS.md"] == "[a](../a.md) [old](OLD.md)"
    assert "````python\nx = 1\n````" in texts["source/examples/one.py.md"]
    assert "## two.toml" in texts["source/examples.md"]


def test_the_numbers_of_the_decision_table_are_those_of_the_results() -> None:
    shown = set(re.findall(r"[\d.]+ ± [\d.]+", read("choosing.md")))
    assert len(shown) > 15
    main = read("results/results.md").split("\n## main\n")[1].split("\n## ")[0]
    assert shown <= set(re.findall(r"[\d.]+ ± [\d.]+", main))
    compared = parts.comparison()
    assert compared.count("[`rerope`](strategies/rerope.md)") == 2
    assert "10.22 ± 0.62" in compared


def test_measured_rows_come_from_the_results_page() -> None:
    text = (
        "# R\n\n## ablations\n\n```\nposenc eval x\n```\n\n### p: a\n\n| s | 256 |\n| --- | --- |\n| lampe, U | 1 |\n\n"
        "## main\n\n```bash\nposenc eval main.yaml\n```\n\n### p: a\n\n| s | 256 |\n| --- | --- |\n| lampe | 9.2 |\n"
        "| lampe+yarn | 8 |\n| rerope | 9.3 |\n\n### p by depth\n\n| s | depth |\n| --- | ---: |\n| lampe | 0.1 |\n"
    )
    tables = parts._rows_of_results(text, "lampe")
    assert tables == ["a (`posenc eval main.yaml`):\n\n| s | 256 |\n| --- | --- |\n| lampe | 9.2 |"]
    assert parts._rows_of_results(text, "dca") == []
    with pytest.raises(LookupError, match="no row of 'unheard'"):
        parts.measured("unheard")


def test_the_page_of_auto_shows_its_picks_and_their_numbers() -> None:
    auto = posenc.strategy("auto", window=256, calibration=str(ROOT / "posenc" / "profiles" / "tiny.yaml"))
    shown = parts.picks().splitlines()[-5:]
    calibrated = read("results/results.md")
    for row, length in zip(shown, (256, 512, 1024, 2048, 4096), strict=True):
        pick = auto.plan(length).strategy.removeprefix("auto -> ")
        assert row.startswith(f"| {length} | `{pick}` |")
        assert all(number in calibrated for number in re.findall(r"[\d.]+ ± [\d.]+", row))
