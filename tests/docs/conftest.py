"""A folder like a clone of the repository for each page; nothing written there stays."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs.collect import all_blocks
from tests.docs.shell import FOLDERS, copy_repository


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only copy that all pages share."""
    folder = tmp_path_factory.mktemp("clone")
    copy_repository(folder)
    return folder


@pytest.fixture
def desk(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for one page, with the copy and every Python file that any page shows."""
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(clone / folder)
    (tmp_path / "out" / "texts").mkdir(parents=True)
    pages = (page.read_text(encoding="utf-8") for page in sorted((clone / "docs").glob("*.md")))
    (tmp_path / "out" / "texts" / "persuasion.txt").write_text(
        "".join(pages), encoding="utf-8"
    )  # stands in for the novel
    for block in all_blocks("python"):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, level, threads = set(sys.modules), logging.getLogger("posenc").level, torch.get_num_threads()
    yield tmp_path
    logging.getLogger("posenc").setLevel(level)
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
