"""Every registered backend, including third-party ones, under the public contract."""

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
        if name == "triton" and INTERPRETED:  # tests/kernels/triton/test_triton.py has more; a case takes a second
            self.settings = hypothesis.settings(self.settings, max_examples=8)
