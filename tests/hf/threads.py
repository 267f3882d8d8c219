"""Run work in several threads at once, for tests of shared state."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PATIENCE = 60.0
"""Seconds after which a test that waits forever fails."""


@contextmanager
def fast_switching() -> Iterator[None]:
    """Make threads switch after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Start every piece of work in its own thread at once and return the results; raise the first error."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        try:
            start.wait(PATIENCE)
            results[number] = works[number]()
        except BaseException as error:  # including failed assertions, which must reach the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    with fast_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


def shared_out(work: Callable[[Any], Any], items: Sequence[Any], threads: int) -> dict[Any, Any]:
    """Do the work of every item in this many threads, which take the items in turns."""

    def part(first: int) -> Callable[[], dict[Any, Any]]:
        return lambda: {item: work(item) for item in items[first::threads]}

    merged: dict[Any, Any] = {}
    for results in at_once(*(part(first) for first in range(threads))):
        merged |= results
    return merged
