"""Backends that fail on purpose, in a distribution beside posenc: `scripts.gpu` must survive them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from posenc.hookspecs import hookimpl
from posenc.kernels.cpu.backend import CpuFlashBackend

MARKED = 128
"""Length in tokens of the case at which the last two backends fail; no canary case has it."""


class Unwritten(CpuFlashBackend):
    name = "unwritten"

    def attend(self, q, *rest, **options):
        out, lse = super().attend(q, *rest, **options)
        partial = torch.empty_like(out)
        partial[:, :, : q.shape[2] // 2] = out[:, :, : q.shape[2] // 2]
        return partial, lse


class Crashing(CpuFlashBackend):
    name = "crashing"

    def attend(self, q, k, *rest, **options):
        if q.shape[2] == MARKED:
            os.abort()
        return super().attend(q, k, *rest, **options)


class Hanging(CpuFlashBackend):
    name = "hanging"

    def attend(self, q, k, *rest, **options):
        if k.shape[2] == MARKED:
            time.sleep(600)
        return super().attend(q, k, *rest, **options)


@hookimpl
def posenc_register_backends(register):
    for kind in (Unwritten, Crashing, Hanging):
        register(kind())


def install(folder: Path) -> None:
    """Write the distribution, for a PYTHONPATH that contains the folder."""
    facts = folder / "made_up-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[posenc]\nmade_up = made_up\n")
    (folder / "made_up.py").write_text(Path(__file__).read_text())
