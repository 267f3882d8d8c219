"""A process that answers one request after the other, so that a broken kernel takes down only this process.

Requests come as JSON lines on stdin, ``{"call": "module:function", "with": {...}}``; answers go as JSON lines to the
original stdout. An exception is also an answer. After an error of the device the process ends, because its
CUDA context would fail every later request.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

BROKEN_DEVICE = 3
"""Exit status after an error that the CUDA context does not survive."""


def main() -> int:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, _, name = request["call"].partition(":")
            answer: dict[str, Any] = {"answer": getattr(importlib.import_module(module), name)(**request["with"])}
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {reason}"}
        if "error" in answer and not device_works():
            answer["ends"] = True
        print(json.dumps(answer), file=answers, flush=True)
        if "ends" in answer:
            return BROKEN_DEVICE
    return 0


def device_works() -> bool:
    """Return False once the CUDA context is broken, for example by an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a broken context can hang the interpreter's normal exit
