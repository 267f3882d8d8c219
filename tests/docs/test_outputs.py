"""Output shown on pages equals that of the code; measured numbers may differ, words and shapes may not."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import posenc
from posenc.testing import AdapterContract, BackendContract, ContractViolation, StrategyContract
from tests.contract.test_adapter_mutants import FrequenciesOfAShortText, good, long_phi
from tests.contract.test_backend_mutants import drop_a_key, mistaken
from tests.docs import shell
from tests.docs.collect import ROOT, Block, all_blocks, blocks, page_names
from tests.docs.pictures import cpu_calls, end_to_end, layers, named_paths, one_query, seams, windowed_calls
from tests.kernels.test_dispatch import call

Check = Callable[[str, pytest.MonkeyPatch], None]


def shape(text: str) -> str:
    """Return a text without its numbers, its line breaks and the lengths of its rules."""
    return " ".join(re.sub(r"─+", "-", re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "0", text)).split())


def demo(shown: str, patch: pytest.MonkeyPatch) -> None:
    assert shape(shown) == shape(shell.run("posenc demo --out out/demo", patch))


def micro(shown: str, patch: pytest.MonkeyPatch) -> None:
    assert shape(shown) == shape(shell.run("python -m scripts.micro", patch))


def trace(shown: str, patch: pytest.MonkeyPatch) -> None:
    posenc.backends()  # their discovery is traced as well
    patch.setenv("POSENC_TRACE", "1")
    logging.getLogger("posenc").setLevel(logging.NOTSET)
    with redirect_stderr(StringIO()) as printed:
        call()
    assert printed.getvalue().startswith(shown.strip().removesuffix(" ...)"))


def lampe(shown: str, _: pytest.MonkeyPatch) -> None:
    """The formulas, evaluated as written, give the plan."""
    names: dict[str, Any] = {"floor": math.floor, "exp": math.exp, "P": 300, "H": 32, "T": 10}
    names |= {"c": 192, "a": 0.003, "b": -0.5}
    for name, right in re.findall(r"^(\S+) += (.+?)(?:   .*)?$", shown, re.MULTILINE):
        product = re.sub(r"\b([aU]) ([Pp])\b", r"\1 * \2", right)
        if name == "m(p)":
            names["m"] = eval(f"lambda p: {product}", names)
        elif name == "R":
            assert product == "the largest r with m(r) = m(T)"
            names["R"] = max(r for r in range(names["P"]) if names["m"](r) == names["m"](names["T"]))
        else:
            names[name] = eval(product, names)
    mapping = {key: names[key] for key in "cab"}
    plan = posenc.strategy("lampe", window=256, mapping=mapping, head=names["H"], tail=names["T"]).plan(names["P"])
    seen, m = plan.relative_positions(), names["m"]
    assert not plan.is_identity
    for i in range(names["P"]):
        for j in range(i + 1):
            middle, tail = names["H"] <= i - j, i - j >= names["P"] - names["R"]
            assert seen[i, j] == (i - names["b2"] - j if tail else m(i) + names["b1"] - m(j) if middle else i - j)


def violation(contract: Any, test: str) -> str:
    with pytest.raises(ContractViolation) as caught:
        getattr(contract(), test)()
    return str(caught.value)


def strategy_message(shown: str, _: pytest.MonkeyPatch) -> None:
    """The message is for ``halved.py`` of the guide with one bound off by one."""
    names: dict[str, Any] = {"__name__": "halved"}
    (code,) = (block.code for block in blocks("docs/write-a-strategy.md") if block.file == "halved.py")
    wrong = code.replace("0, near, index, index)", "0, near + 1, index, index)")
    assert wrong != code
    exec(compile(wrong, "halved.py", "exec", dont_inherit=True), names)
    contract = type("TestHalved", (StrategyContract,), {"strategy": names["Halved"], "params": ({"near": 1},)})
    assert violation(contract, "test_partition") == shown.strip()


def adapter_message(shown: str, _: pytest.MonkeyPatch) -> None:
    members = {"adapter": good(FrequenciesOfAShortText, name="mine"), "model": long_phi, "window": 32}
    assert shape(violation(type("TestMine", (AdapterContract,), members), "test_identity")) == shape(shown)


def backend_message(shown: str, _: pytest.MonkeyPatch) -> None:
    backend = mistaken(plan=drop_a_key)
    type(backend).name = "mine"
    contract = type("TestMine", (BackendContract,), {"backend": backend})
    assert shape(violation(contract, "test_matches_the_definition")) == shape(shown)


CHECKS: dict[str, tuple[str, Check]] = {
    "model tiny (": ("README.md", demo),
    ' "lampe" / posenc.yaml': ("docs/architecture.md", seams),
    " the decoder's keyword": ("docs/internals/one-forward.md", layers),
    "posenc: backend auto": ("docs/internals/choosing-a-backend.md", trace),
    "The calls of self_extend (window_size=256) for a prompt of 1024 tokens on the CPU": (
        "docs/internals/plan-to-calls.md",
        cpu_calls,
    ),
    "The calls of self_extend (window_size=256) for a prompt of 1024 tokens on a kernel": (
        "docs/internals/plan-to-calls.md",
        windowed_calls,
    ),
    "One token of lampe (window 2048) after a prompt of 8192: 3 key": ("docs/internals/plan-to-calls.md", one_query),
    "One token of lampe (window 2048) after a prompt of 8192, in 4": ("docs/internals/triton-kernels.md", end_to_end),
    "flash operator, ns": ("docs/internals/cpu-kernel.md", micro),
    "U     = floor(": ("docs/strategies/lampe.md", lampe),
    "Halved(window=16": ("docs/testing.md", strategy_message),
    "adapter 'mine'": ("docs/testing.md", adapter_message),
    "mine: the output": ("docs/testing.md", backend_message),
}
"""By the beginning of a block: its page, and the check that compares it with the code."""


def check_of(block: Block) -> Check | None:
    return next(
        (check for begin, (page, check) in CHECKS.items() if block.page == page and block.code.startswith(begin)), None
    )


@pytest.mark.parametrize(
    "page", [page for page in page_names() if page.startswith(("docs/internals", "docs/decisions"))]
)
def test_the_internals_name_existing_paths(page: str) -> None:
    named = named_paths((ROOT / page).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_shown_output_has_a_check() -> None:
    shown = [block for block in all_blocks("text") if block.untested is None]
    assert [str(block) for block in shown if check_of(block) is None] == []
    assert len(shown) == len(CHECKS)


@pytest.mark.parametrize("block", [block for block in all_blocks("text") if block.untested is None], ids=str)
def test_a_shown_output_is_right(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check = check_of(block)
    assert check is not None
    check(block.code, monkeypatch)


@pytest.mark.parametrize(
    ("check", "said", "wrong"),
    [
        (trace, "cpu_flash", "reference"),
        (lampe, "m(H) - 1", "m(H)"),
        (strategy_message, "i=1", "i=2"),
        (micro, "in place", "elsewhere"),
        (seams, "posenc/planning", "posenc/plannings"),
        (layers, "posenc/backend.py", "posenc/backends.py"),
        (cpu_calls, "1  L\\b", "1    L"),
        (cpu_calls, "6 of the segment", "5 of the segment"),
        (windowed_calls, "left=255", "left=256"),
        (windowed_calls, "g\\n    n    n", "g    n    n"),
        (one_query, "8065", "8064"),
        (one_query, "4096 to", "4097 to"),
        (end_to_end, "2112", "2048"),
    ],
)
def test_another_output_fails(check: Check, said: str, wrong: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in all_blocks("text") if check_of(block) is check)
    assert said in block.code
    with pytest.raises(AssertionError):
        check(block.code.replace(said, wrong), monkeypatch)
