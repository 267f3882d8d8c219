"""What a release states about itself: version, licence, date, addresses, and what stays stable."""

from __future__ import annotations

import re
import tarfile
from datetime import date
from pathlib import Path

import pytest
import yaml

import posenc
from posenc import hookspecs
from scripts.environments import ROOT
from scripts.package import build
from tests.packaging.test_project import PROJECT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
REPOSITORY = "https://github.com/posenc/posenc"
KEYS = """
    abstract authors cff-version commit contact date-released doi identifiers keywords license license-url message
    preferred-citation references repository repository-artifact repository-code title type url version
"""
"""Of the Citation File Format 1.2.0."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_of_this_package() -> None:
    assert CITATION["version"] == posenc.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["abstract"] == PROJECT["description"]
    assert CITATION["keywords"] == PROJECT["keywords"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["repository-code"] == PROJECT["urls"]["Repository"]


def test_the_citation_has_the_format() -> None:
    """Known keys, the required ones among them, and text wherever the format has text."""
    assert {"authors", "cff-version", "message", "title"} <= set(CITATION) <= set(KEYS.split())
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert all(isinstance(value, str) for key, value in CITATION.items() if key not in ("authors", "keywords"))


def test_the_changelog_dates_the_version() -> None:
    """The version has a section with the date of the citation, right below what is not released yet."""
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == [("Unreleased", ""), (posenc.__version__, CITATION["date-released"])]
    assert date.fromisoformat(CITATION["date-released"]).isoformat() == CITATION["date-released"]


def test_security_fixes_go_into_this_version() -> None:
    minor = posenc.__version__.rsplit(".", 1)[0]
    assert f"| {minor}.x | yes |" in read("SECURITY.md")
    assert f"{REPOSITORY}/security/advisories/new" in read("SECURITY.md")


def test_addresses_are_of_one_repository() -> None:
    assert all(address.startswith(REPOSITORY) for address in PROJECT["urls"].values())
    for address in PROJECT["urls"].values():
        file = address.partition("/blob/main/")[2]
        assert not file or (ROOT / file).is_file()
    for name in ("SECURITY.md", "RELEASING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert all(found.startswith(REPOSITORY) for found in re.findall(r"https://github\.com/[^)\s]+", read(name)))


def test_the_promise_names_every_hook_and_every_format() -> None:
    stable = read("RELEASING.md").split("\n## What is stable\n")[1].split("\n## ")[0]
    hooks = {name for name in vars(hookspecs) if name.startswith("posenc_register_")}
    assert hooks <= set(re.findall(r"`(posenc_register_\w+)`", stable))
    declared = {
        found
        for path in (ROOT / "posenc").rglob("*.py")
        for found in re.findall(
            r'format: Literal\["(posenc-[\w-]+)"\].*\n +version: Literal\[(\d+)\]', path.read_text(encoding="utf-8")
        )
    }
    assert declared == set(re.findall(r"^\| `(posenc-[\w-]+)` \| (\d+) \|", stable, re.MULTILINE))
    assert len(declared) >= 5


@pytest.mark.parametrize("page", ["docs/hooks.md", "CONTRIBUTING.md"])
def test_the_promise_is_linked(page: str) -> None:
    assert re.search(r"\]\((?:\.\./)?RELEASING\.md[)#]", read(page))


def test_the_sdist_holds_them(tmp_path: Path) -> None:
    (sdist,) = build(tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "RELEASING.md", "SECURITY.md"} <= names
    assert "benchmarks/recipes.toml" in names
