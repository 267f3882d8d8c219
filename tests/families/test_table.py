"""The generated table has the promised families, and its three copies agree."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "docs" / "families.json").read_text())
VERDICTS = {row["model_type"]: row for row in TABLE["families"]}

PROMISED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "granite",
    "olmo2",
    "olmo3",
    "starcoder2",
    "smollm3",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "stablelm",
    "gpt_neox",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "minimax_m2",
    "exaone4",
    "helium",
    "nemotron",
    "seed_oss",
    "ernie4_5",
)


def test_at_least_ninety_families_are_exact_and_none_is_silently_wrong() -> None:
    counts = [row["verdict"] for row in VERDICTS.values()]
    assert counts.count("exact") >= 90
    assert set(counts) <= {"exact", "refused", "unbuilt"}


@pytest.mark.parametrize("name", PROMISED)
def test_promised_families_are_exact(name: str) -> None:
    row = VERDICTS[name]
    assert row["verdict"] == "exact"
    assert row["identity"] == row["identity_bfloat16"] == "bit-equal"
    assert row["remap_error"] < 1e-3
    assert row["remap_effect"] > 1e-2


def test_every_refusal_has_a_reason() -> None:
    assert all(len(row["reason"]) > 20 for row in VERDICTS.values() if row["verdict"] != "exact")


def test_the_copies_agree() -> None:
    shipped = json.loads((files("posenc_adapters") / "families.json").read_text(encoding="utf-8"))
    assert shipped["transformers"] == TABLE["transformers"]
    assert set(shipped["families"]) == set(VERDICTS)
    assert all((shipped["families"][n] == "exact") == (row["verdict"] == "exact") for n, row in VERDICTS.items())
    page = (ROOT / "docs" / "families.md").read_text()
    assert all(f"| {name} |" in page for name in VERDICTS)
