"""Every registered backend, third-party ones included, under the public contract."""

from __future__ import annotations

import hypothesis
import pytest

import posenc
from posenc.kernels.triton.backend import INTERPRETED


@pytest.mark.parametrize("name", posenc.backends())
class TestRegistered(posenc.testing.BackendContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.backend = posenc.backends()[name].backend
        if name == "triton" and INTERPRETED:  # a second per case, and more tests in tests/kernels/triton/test_triton.py
            self.settings = hypothesis.settings(self.settings, max_examples=8)
