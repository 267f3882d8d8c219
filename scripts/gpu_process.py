"""Processes for work that may crash or hang, each with a time limit, so that the parent always continues."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from scripts.gpu_site import ROOT

LAST_WORDS = 2000
"""Number of last bytes of a process's log that are searched for why it ended."""


class Died(Exception):
    """A worker ended, was stopped, or reports an error; the message says which."""


class Worker:
    """A process that answers requests (:mod:`scripts.gpu_worker`), started at once and restarted after it ended.

    Parameters
    ----------
    log : Path
        File to which its stderr is appended.
    environment : dict of str to str
        Variables in addition to those of this process.
    """

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log, self.environment = log, environment or {}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.begin()

    def begin(self) -> None:
        """Start the process, which imports in the background."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.gpu_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                text=True,
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.answers), daemon=True).start()

    def ask(self, call: str, limit: float, **arguments: Any) -> Any:
        """Return the answer to ``call(**arguments)`` within ``limit`` seconds; ``call`` is ``"module:function"``.

        Raises
        ------
        Died
            If there is no answer in that time, the process ends, or the call raises.
        """
        if not self.alive:
            self.begin()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"call": call, "with": arguments}) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=max(0.0, limit))
        except queue.Empty:
            self.end()
            raise Died(f"stopped after {limit:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise Died(f"the process ended ({_shown(status)}){self._last_words()}")
        answer = json.loads(line)
        if answer.get("ends"):
            self.end()
        if "error" in answer:
            raise Died(answer["error"])
        return answer["answer"]

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.process.poll() is None

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def _last_words(self) -> str:
        """Return the last line of the log."""
        lines = self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:200]}" if lines else ""


class Workers(dict[str, Worker]):
    """A process per name, started side by side and stopped together."""

    def __init__(self, names: Iterable[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        super().__init__((name, Worker(folder / f"{name}.log", environment)) for name in dict.fromkeys(names))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.values():
            worker.end()


def _read(stream: Any, answers: queue.Queue[str]) -> None:
    for line in stream:
        answers.put(line)
    answers.put("")  # it ended


def _shown(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def end_by_exception() -> None:
    """Make SIGTERM raise SystemExit, so that results are still collected and no process is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
