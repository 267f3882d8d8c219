"""Make ``performance.md`` from result files and nothing else."""

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
"""Columns after ``COLUMNS``, which only runs with baselines have."""

NOTHING = "-"

INTRODUCTION = f"""\
# What remapping costs

`posenc bench --report docs/results` makes this page from the result files (`*.json`) beside it: change those, not this
page. `make bench` measures them again.

Both sides of a case alternate in one process: plain, remapped, plain, and so on. Times are medians over the rounds. A
ratio compares the two calls of one round, and is given as median, lowest and highest. Both sides include rotation;
plain rotates with the operations of transformers' own models. The first call of each side is kept separately (`first`
in the files): in it, the remapped side makes its plan and tables, which it keeps for later layers, tokens and prompts
of that length. The pretraining window is a quarter of the length, so that every segment of a plan is used.

Memory is the peak of one call beyond its inputs, tables and output included, read from the high-water mark of a
separate process (`posenc/bench/memory.py`). Models have random weights and the shape of the model they are named
after; in `decode`, both caches hold the same random keys.

## Goals on the CPU

For {DTYPE} and {THREADS} threads. A number is rounded before it is compared with its goal.
"""

GPU = f"""\
## Goals on a GPU

For {GPU_DTYPE}. Times are compared with torch's flash attention *alone*: the kernel on the same tensors, rotated
beforehand, called in the same rounds. The tables of the runs also have the ratio to plain, which rotates as
transformers' models do, and the ratio to cuDNN's attention alone if that can run. Prefill is timed by CUDA events
around each call. One query is timed by replaying CUDA graphs of every side, with ten calls in each: its time is that
of the kernels, without Python. Memory is the most that torch allocated during the call. Before anything is timed, the
correctness tests of every backend run, and a canary compares sampled rows of its outputs at 4k and 128k tokens with
float64. A backend that fails the canary is not timed, and the times of a backend that fails a test count as missed.
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
        If the folder holds no result file, a file is not one, or the page cannot be written.
    """
    text = page(read_folder(folder))
    target = folder / PAGE
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def page(results: dict[str, Result]) -> str:
    """Make the text of the page."""
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
    """Count the goals that are met, and make their tables."""
    marks: list[str] = []
    tables = [_target(target, results, numbered, marks) for target in targets]
    met, missed, open_ = (marks.count(mark) for mark in ("met", "missed", ""))
    count = f"**{met} met, {missed} missed, {open_} not measured.** The number in brackets is that of the run, below."
    return [count, "", *tables]


def _target(target: Target, results: dict[str, Result], numbered: dict[str, int], marks: list[str]) -> str:
    """Make one table of goals: a line per goal, a column per strategy."""
    body = []
    for goal in target.goals:
        sign = "≥" if goal.measure == "rate" else "≤"
        measured = (_cell(goal, strategy, results, numbered, marks) for strategy in target.strategies)
        body.append([goal.shape, str(goal.length), f"{sign} {goal.limit:.2f}", *measured])
    return f"### {target.title}\n\n{_markdown(['shape', 'tokens', 'goal', *target.strategies], body)}\n"


def _cell(goal: Goal, strategy: str, results: dict[str, Result], numbered: dict[str, int], marks: list[str]) -> str:
    """Show the value and the verdict of every run that measured a goal; adds each verdict to `marks`."""
    verdicts = []
    for name, result in results.items():
        for row in result.rows:
            value = goal.value(row) if row.strategy == strategy and goal.applies(row) else None
            if value is None:
                continue
            fails_checks = any(check.backend == row.backend and not check.good for check in result.checks)
            met = goal.met(value) and not fails_checks
            marks.append("met" if met else "missed")
            verdict = "met" if met else "**fails its tests**" if fails_checks else "**missed**"
            verdicts.append(f"{value:.2f} {verdict} [{numbered[name]}]")
    if not verdicts:
        marks.append("")
    return ", ".join(verdicts) or "not measured"


def _run(number: int, name: str, result: Result) -> str:
    """Make the section of one run: command, machine, kinds, times, refused baselines, checks, cases left out."""
    kinds = dict.fromkeys((row.kind, row.cache) for row in result.rows)
    refused = dict.fromkeys((name, reason) for row in result.rows for name, reason in row.refused.items())
    lines = [f"### {number}. [{name}]({name})", "", "```bash", result.command, "```", ""]
    lines += [describe_machine(result.machine), ""]
    lines += [
        f"- `{kind_shown(kind, cache)}`: {what_of(kind, cache)}; plain is {KINDS[kind].baseline}{_clock(result, kind)}."
        for kind, cache in kinds
    ]
    lines += ["", _markdown(columns(result), table_rows(result)), ""]
    if refused:
        lines += [*(f"- `{name}` alone could not run every case: {reason}" for name, reason in refused), ""]
    if result.checks:
        lines += ["Correctness tests and canary on this GPU, before the run:", ""]
        lines += [*(f"- `{check.backend}`{_of_canary(check)}: {_outcome(check)}" for check in result.checks), ""]
    if result.left_out:
        lines += ["Not measured:", "", *(f"- {reason}" for reason in result.left_out), ""]
    return "\n".join(lines)


def _clock(result: Result, kind: str) -> str:
    """Say how a kind was timed, unless by the wall clock."""
    names = {"events": "CUDA events", "graph": "replayed CUDA graphs"}
    clocks = dict.fromkeys(names[row.clock] for row in result.rows if row.kind == kind and row.clock in names)
    return f"; timed by {' or '.join(clocks)}" if clocks else ""


def _of_canary(check: Check) -> str:
    return ", canary" if check.kind == "canary" else ""


def _outcome(check: Check) -> str:
    skipped = "not declared" if check.kind == "tests" else "not run"
    stopped = "" if check.stopped_after is None else f"; stopped after {check.stopped_after:.0f} s, before all had run"
    problem = f"; {check.problem}" if check.problem else ""
    return f"{check.passed} passed, {check.failed} failed, {check.skipped} {skipped}{stopped}{problem}"


def describe_machine(machine: Machine) -> str:
    """Describe the machine in one paragraph, with a warning if other work ran on it."""
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
    """Name the columns of ``table_rows``."""
    return [*COLUMNS, *_baselines(result)]


def table_rows(result: Result) -> list[list[str]]:
    """Make one line per case, for ``columns``."""
    return [[*_line(row), *(_over(row, name) for name in _baselines(result).values())] for row in result.rows]


def _baselines(result: Result) -> dict[str, str]:
    """The columns of baselines that some case has."""
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
