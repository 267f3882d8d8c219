"""Whether Triton interprets kernels in this process: decided by the environment, before Triton is imported."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Triton's interpreter runs kernels on the CPU, slowly, so that tests need no GPU. Read once, and as Triton does."""

MENDED = (3, 7)
"""The first release of Triton whose interpreter runs with numpy 2.4 and later."""


def mend_interpreter(interpreter: Any) -> None:
    """Let the interpreter of an older Triton turn arrays of one element into integers by way of a scalar.

    Triton 3.6 and before give the array itself to ``int``, which is an error since numpy 2.4: no loop over a bound that
    a kernel has computed could run. Newer releases are left alone.

    Parameters
    ----------
    interpreter : module
        ``triton.runtime.interpreter``.
    """
    if tuple(int(part) for part in version("triton").split(".")[:2]) >= MENDED:
        return
    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
