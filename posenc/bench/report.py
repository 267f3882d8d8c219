"""``performance.md``: a page made of result files and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from posenc.bench.cases import CUDNN, FLASH, KINDS, kind_shown, what_of
from posenc.bench.goals import DTYPE, GPU_DTYPE, GPU_TARGETS, TARGETS, THREADS, Goal, Target
from posenc.bench.results import BenchRow, Check, Machine, Result, read_folder
from posenc.files import replacing

PAGE = "performance.md"
NUMBERS = ["tokens", "plain ms", "remapped ms", "ratio", "plain MiB", "remapped MiB", "memory ratio"]
COLUMNS = ["kind", "shape", "dtype", "threads", "backend", "strategy", *NUMBERS[:4], "lowest .. highest", *NUMBERS[4:]]
BASELINES = {"over flash alone": FLASH, "over cuDNN alone": CUDNN}
"""Columns that only runs with baselines have, after ``COLUMNS``."""

NOTHING = "-"

INTRODUCTION = f"""\
# What remapping costs

This page is made by `posenc bench --report docs/results` from the result files (`*.json`) beside it: change those,
not this page. `make bench` measures them anew.

Both sides of a case run in turns in one process: plain, remapped, plain, and so on. Times are medians over the rounds;
a ratio is that of the two calls of one round, given as median and as lowest and highest. Rotation is included on both
sides; plain rotates with the operations of transformers' own models. The first call of each side is kept apart (`first`
in the files): there, the remapped side makes its plan and tables and keeps them for later layers, tokens and prompts
of that length. The pretraining window is a quarter of the length, so that every segment of a plan is at work.

Memory is the peak of one call beyond its inputs, tables and output included, read from the high-water mark of a process
of its own (`posenc/bench/memory.py`). Models have random weights and the shape of the one they are named after; in
`decode`, both caches hold the same random keys.

## Goals on the CPU

For {DTYPE} and {THREADS} threads. A number is rounded before it is held against its goal.
"""

GPU = f"""\
## Goals on a GPU

For {GPU_DTYPE}. Times are held against torch's flash attention *alone*: the kernel on the same tensors, rotated
beforehand, called in the same rounds. The ratio to plain, which rotates as transformers' models do, is in the tables
of the runs, and so is that to cuDNN's attention alone where it can run. Prefill is timed by CUDA events around each
call, one query by replaying CUDA graphs of every side, ten calls in each: its time is that of the kernels, without
Python's. Memory is the most that torch held during the call. Before anything is timed, the correctness tests of every
backend run, and a canary compares sampled rows of its outputs at 4k and 128k tokens with float64. A backend that fails
the canary is not timed, and the times of one that fails a test count as missed.
"""

NO_GPU = """\
## Goals on a GPU

No GPU has been measured yet. `make gpu` measures one, and this section appears.
"""


def write_report(folder: Path) -> Path:
    """Write the page from the folder's result files.

    Raises
    ------
    InvalidInputError
        If a file is not a result, there is none, or the page cannot be written.
    """
    text = page(read_folder(folder))
    target = folder / PAGE
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def page(results: dict[str, Result]) -> str:
    """The page as text."""
    numbered = {name: number for number, name in enumerate(results, 1)}
    measured_gpu = any(row.device == "cuda" for result in results.values() for row in result.rows)
    lines = [
        INTRODUCTION,
        *_targets(TARGETS, results, numbered),
        *([GPU, *_targets(GPU_TARGETS, results, numbered)] if measured_gpu else [NO_GPU]),
        "## Runs",
        "",
    ]
    for name, result in results.items():
        lines.append(_run(numbered[name], name, result))
    return "\n".join(lines).rstrip() + "\n"


def _targets(targets: Sequence[Target], results: dict[str, Result], numbered: dict[str, int]) -> list[str]:
    """How many goals are met, and their tables."""
    marks: list[str] = []
    tables = [_target(target, results, numbered, marks) for target in targets]
    met, missed, open_ = (marks.count(mark) for mark in ("met", "missed", ""))
    count = f"**{met} met, {missed} missed, {open_} not measured.** A number in brackets is that of the run, below."
    return [count, "", *tables]


def _target(target: Target, results: dict[str, Result], numbered: dict[str, int], marks: list[str]) -> str:
    """One table of goals: a line per goal, a column per strategy."""
    body = []
    for goal in target.goals:
        sign = "≥" if goal.measure == "rate" else "≤"
        measured = (_cell(goal, strategy, results, numbered, marks) for strategy in target.strategies)
        body.append([goal.shape, str(goal.length), f"{sign} {goal.limit:.2f}", *measured])
    return f"### {target.title}\n\n{_markdown(['shape', 'tokens', 'goal', *target.strategies], body)}\n"


def _cell(goal: Goal, strategy: str, results: dict[str, Result], numbered: dict[str, int], marks: list[str]) -> str:
    shown = []
    for name, result in results.items():
        for row in result.rows:
            value = goal.value(row) if row.strategy == strategy and goal.applies(row) else None
            if value is None:
                continue
            wrong = any(check.backend == row.backend and not check.good for check in result.checks)
            met = goal.met(value) and not wrong
            marks.append("met" if met else "missed")
            verdict = "met" if met else "**fails its tests**" if wrong else "**missed**"
            shown.append(f"{value:.2f} {verdict} [{numbered[name]}]")
    if not shown:
        marks.append("")
    return ", ".join(shown) or "not measured"


def _run(number: int, name: str, result: Result) -> str:
    kinds = dict.fromkeys((row.kind, row.cache) for row in result.rows)
    lines = [
        f"### {number}. [{name}]({name})",
        "",
        "```bash",
        result.command,
        "```",
        "",
        describe_machine(result.machine),
    ]
    lines += [
        "",
        *(
            f"- `{kind_shown(kind, cache)}`: {what_of(kind, cache)}; "
            f"plain is {KINDS[kind].baseline}{_clock(result, kind)}."
            for kind, cache in kinds
        ),
    ]
    lines += ["", _markdown(columns(result), table_rows(result)), ""]
    refused = dict.fromkeys((name, reason) for row in result.rows for name, reason in row.refused.items())
    lines += [
        *(f"- `{name}` alone could not run every case: {reason}" for name, reason in refused),
        *([""] if refused else []),
    ]
    if result.checks:
        lines += [
            "Correctness tests and canary on this GPU, before:",
            "",
            *(f"- `{c.backend}`{_of_canary(c)}: {_verdict(c)}" for c in result.checks),
            "",
        ]
    if result.left_out:
        lines += ["Not measured:", "", *(f"- {what}" for what in result.left_out), ""]
    return "\n".join(lines)


def _clock(result: Result, kind: str) -> str:
    """How a kind was timed, where that is not the wall clock."""
    names = {"events": "CUDA events", "graph": "replayed CUDA graphs"}
    clocks = dict.fromkeys(names[row.clock] for row in result.rows if row.kind == kind and row.clock in names)
    return f"; timed by {' or '.join(clocks)}" if clocks else ""


def _of_canary(check: Check) -> str:
    return ", canary" if check.kind == "canary" else ""


def _verdict(check: Check) -> str:
    rest = "not declared" if check.kind == "tests" else "not run"
    stopped = "" if check.stopped_after is None else f"; stopped after {check.stopped_after:.0f} s, before all had run"
    problem = f"; {check.problem}" if check.problem else ""
    return f"{check.passed} passed, {check.failed} failed, {check.skipped} {rest}{stopped}{problem}"


def describe_machine(machine: Machine) -> str:
    """The machine in one paragraph, with a warning where it was not quiet."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    memory = "" if machine.memory_gib is None else f", {machine.memory_gib:g} GiB"
    loads = (NOTHING if load is None else f"{load:g}" for load in (machine.load_before, machine.load_after))
    gpu = "" if machine.gpu is None else f"{machine.gpu}, driver {machine.driver or 'unknown'}; "
    text = (
        f"{gpu}{machine.cpu}, {machine.cores} cores ({machine.vector_units}){memory}, {machine.system}; {versions}; "
        f"OMP_WAIT_POLICY {machine.wait_policy}; load average {' before and '.join(loads)} after, the run included."
    )
    if machine.other_cores is not None:
        text += f" Other work took {machine.other_cores:g} cores meanwhile."
    if machine.busy:
        text += " **The machine was busy with other work: do not trust these times.**"
    return text


def columns(result: Result) -> list[str]:
    """Names of the columns of ``table_rows``."""
    return [*COLUMNS, *_baselines(result)]


def table_rows(result: Result) -> list[list[str]]:
    """One line per case, for ``columns``."""
    return [[*_line(row), *(_over(row, name) for name in _baselines(result).values())] for row in result.rows]


def _baselines(result: Result) -> dict[str, str]:
    """The columns of baselines that some case was held against."""
    return {title: name for title, name in BASELINES.items() if any(name in row.baselines for row in result.rows)}


def _over(row: BenchRow, baseline: str) -> str:
    ratio = row.over(baseline)
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _line(row: BenchRow) -> list[str]:
    memory = [NOTHING] * 3
    if row.memory is not None:
        memory = [_mib(row.memory.plain), _mib(row.memory.remapped), NOTHING]
        if row.memory_ratio is not None:
            memory[2] = f"{row.memory_ratio:.2f}"
    return [
        kind_shown(row.kind, row.cache),
        row.shape,
        row.dtype,
        str(row.threads),
        row.backend,
        row.strategy,
        str(row.length),
        _milliseconds(row.plain),
        _milliseconds(row.remapped),
        f"{row.ratio:.2f}",
        f"{min(row.ratios):.2f} .. {max(row.ratios):.2f} ({len(row.ratios)})",
        *memory,
    ]


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.2f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    right = [column in NUMBERS or column in BASELINES for column in columns]
    rule = ["---:" if is_number else "---" for is_number in right]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))
