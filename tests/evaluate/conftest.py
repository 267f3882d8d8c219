"""One session for every test of a file, so that the model is loaded once."""

from __future__ import annotations

import pytest

from posenc.evaluate.sweep.session import Session


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()
