"""Models are loaded with the requested dtype and device; impossible requests are refused in one line."""

from __future__ import annotations

import logging

import pytest
import torch

from posenc.errors import InvalidInputError
from posenc.evaluate.models import ModelSpec, find_device, load


def test_a_bare_name_is_loaded_in_float32_on_the_cpu():
    loaded = load("tiny")
    assert (loaded.model.dtype, loaded.model.device.type) == (torch.float32, "cpu")
    assert not loaded.model.training


def test_the_dtype_is_the_requested_one():
    assert load(ModelSpec(name="tiny", dtype="bfloat16", device="cpu")).model.dtype == torch.bfloat16


def test_auto_dtype_is_the_checkpoints_own(tmp_path):
    half = load(ModelSpec(name="tiny", dtype="bfloat16", device="cpu"))
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    assert load(ModelSpec(name=str(tmp_path), dtype="auto", device="cpu")).model.dtype == torch.bfloat16


@pytest.mark.parametrize("there", [True, False])
def test_auto_device_is_a_gpu_if_there_is_one(
    there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    caplog.set_level(logging.INFO, "posenc")
    device = "cuda:0" if there else "cpu"
    assert find_device("auto") == device
    assert caplog.messages == [f"device auto: {device}"]


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "meta"])
def test_a_missing_device_is_refused(device: str):
    with pytest.raises(InvalidInputError, match=f"device '{device}': torch cannot use it here"):
        load(ModelSpec(name="tiny", device=device))


def test_a_device_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(InvalidInputError, match=r"tiny: cannot be put on cpu in torch.float32: CUDA out of memory"):
        load(ModelSpec(name="tiny", device="cpu"))
