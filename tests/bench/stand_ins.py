"""Requests to a worker process in tests, and a step of a plan; nothing here imports torch.

python -m tests.bench.stand_ins well|badly|never FILE    # a step that writes FILE, then ends well, badly or never
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def doubled(number: int) -> int:
    print("what libraries print")
    return 2 * number


def failing() -> None:
    raise ValueError("no such case\nand more of it")


def crashing() -> None:
    print("the last words", file=sys.stderr, flush=True)
    os.abort()


def hanging() -> None:
    time.sleep(600)


if __name__ == "__main__":
    how, file = sys.argv[1:]
    Path(file).write_text(how)
    print(f"ends {how}", flush=True)
    if how == "never":
        hanging()
    sys.exit(how != "well")
