"""Every registered backend, third-party ones included, under the public contract."""

from __future__ import annotations

import pytest

import posenc


@pytest.mark.parametrize("name", posenc.backends())
class TestRegistered(posenc.testing.BackendContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str) -> None:
        self.backend = posenc.backends()[name].backend
