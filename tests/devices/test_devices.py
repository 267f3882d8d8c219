"""A model under every backend of this device, which is a GPU if there is one.

``POSENC_TEST_DEVICE`` names another device, as ``make gpu`` does. The contract tests the backends on their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import posenc
from tests.hf.tiny import WINDOW, make, tokens

DEVICE = os.environ.get("POSENC_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    name
    for name, info in posenc.backends().items()
    if DEVICE in info.capabilities.devices and (name, DEVICE) != ("triton", "cpu")  # interpreted: minutes per model
]
STRATEGIES = ("lampe", "self_extend", "dca", "string", "rerope")
LENGTH, NEW = 150, 4
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.4}
"""Largest difference of a logit relative to the largest logit: weights and norms are rounded as well."""


def dtype_of(name: str) -> torch.dtype:
    """Return the most precise dtype that a backend declares and a model is tested in."""
    return next(dtype for dtype in TOLERANCES if dtype in posenc.backends()[name].capabilities.dtypes)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits of a prompt and of the tokens after it, decoded one by one."""
    with torch.no_grad():
        output = model(ids[:, :LENGTH], use_cache=True)
        parts, cache = [output.logits], output.past_key_values
        for token in ids[:, LENGTH:].split(1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            parts += [output.logits]
    return torch.cat(parts, 1).float().cpu()


def apply(model: Any, strategy: str, backend: str) -> posenc.Handle:
    params = {"mapping": WINDOW // 2, "head": 8, "tail": 5} if strategy == "lampe" else {}
    return posenc.apply(model, strategy, backend=backend, window=WINDOW, **params)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_computes_the_same_as_on_the_cpu(name: str, strategy: str) -> None:
    """Prompt and decoding of a tiny Llama: float32 on the CPU is compared with the backend's dtype on the device."""
    ids = tokens(2, LENGTH + NEW)
    with apply(make("llama"), strategy, "reference") as handle:
        expected = logits(handle.model, ids)
    dtype = dtype_of(name)
    model = make("llama").to(DEVICE, dtype)
    stock = logits(model, ids.to(DEVICE))
    with apply(model, strategy, name) as handle:
        found = logits(handle.model, ids.to(DEVICE))
    allowed = TOLERANCES[dtype] * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= allowed
    assert float((stock - expected).abs().max()) > 2 * allowed  # the remap matters: without it the test would fail
