"""Every number that pages quote from the results is in the linked section of the results."""

from __future__ import annotations

import re

import pytest

from scripts.docs import parts
from tests.docs.test_pages import sections

DOCS = parts.ROOT / "docs"
PAGES = ("results/findings.md", "calibrate.md")
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?: ± \d+\.\d+)?(?![\w.%]*[\w%])")
"""``12.34 ± 0.56``, or ``12.34`` alone; percentages and sizes (``0.7M``) are not checked."""
LINK = re.compile(r"\((?:[\w./]*/)?results\.md#([\w-]+)\)")
UNMEASURED = {"1.02"}
"""Numbers that were set as a goal, not measured."""


def measured() -> dict[str, str]:
    """Return the sections of the results by their anchors."""
    page = sections((DOCS / "results/results.md").read_text(encoding="utf-8"))
    return {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")): text for heading, text in page.items()}


def unproven(text: str, results: dict[str, str]) -> list[str]:
    """Return the faults in one section of a page: numbers in no linked section, and links to missing sections."""
    anchors = LINK.findall(text)
    linked = "\n".join(results.get(anchor, "") for anchor in anchors)
    pairs = re.findall(r"(-?\d+\.\d+) ± (\d+\.\d+)", linked)
    proven = {number for value, error in pairs for number in (value, f"{value} ± {error}")}
    numbers = NUMBER.findall(" ".join(text.split())) if anchors or "±" in text else []
    missing = [f"#{anchor}" for anchor in anchors if anchor not in results]
    return missing + [number for number in numbers if number not in proven | UNMEASURED]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_in_the_results_it_links_to(page: str) -> None:
    results = measured()
    for heading, text in sections((DOCS / page).read_text(encoding="utf-8")).items():
        assert unproven(text, results) == [], f"{page}, {heading}: not in the linked sections of results.md"


def test_findings_are_checked() -> None:
    text = (DOCS / "results/findings.md").read_text(encoding="utf-8")
    assert len(NUMBER.findall(text)) > 20
    assert len(set(LINK.findall(text))) >= 4


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](results.md#a): 1.50 ± 0.02, and 1.50 alone, 3% of 0.7M at 1.02 times", []),
        ("[a](results.md#a): 1.51 ± 0.02", ["1.51 ± 0.02"]),
        ("[a](results.md#a): 1.50\n± 0.03.", ["1.50 ± 0.03"]),
        ("[a](results.md#a): 0.02", ["0.02"]),
        ("1.50 ± 0.02 without a link", ["1.50 ± 0.02"]),
        ("[b](../results/results.md#b)", ["#b"]),
        ("head 64, a = 0.0034, no claim", []),
    ],
)
def test_the_check_detects_wrong_numbers(text: str, wrong: list[str]) -> None:
    assert unproven(text, {"a": "| 1.50 ± 0.02 |"}) == wrong
