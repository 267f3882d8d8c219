"""The progress bar shows the time left even if one step takes minutes."""

from __future__ import annotations

import io

from rich.console import Console

from posenc.cli._output import progress_bar


def test_the_time_left_is_known_even_if_steps_take_minutes():
    now = [0.0]
    terminal = Console(file=io.StringIO(), force_terminal=True, get_time=lambda: now[0])
    bar = progress_bar(terminal)
    task = bar.add_task("", total=1000)
    for _ in range(4):
        now[0] += 120
        bar.update(task, advance=100)
    assert bar.tasks[0].time_remaining == 720


def test_the_bar_is_silent_without_a_terminal():
    shown = io.StringIO()
    with progress_bar(Console(file=shown)) as bar:
        bar.update(bar.add_task("hidden", total=2), advance=1)
    assert shown.getvalue() == ""
