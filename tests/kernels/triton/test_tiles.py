"""The table of tile sizes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

import posenc
from posenc.kernels.triton import tiles as triton_tiles
from posenc.kernels.triton.backend import TritonBackend
from posenc.kernels.triton.tiles import Kernel, TileEntry, TileTable, Tiling


def entry(**changes: object) -> TileEntry:
    facts = {"kernel": "prefill", "capability": (9, 0), "bits": 16, "head_dim": 128, "rows": 64, "keys": 32}
    return TileEntry.model_validate({**facts, "warps": 4, "stages": 2, "source": "a test", **changes})


def test_the_shipped_table_fits_every_case() -> None:
    """It also says where its numbers are from: a committed result, or that they are not measured."""
    table = TileTable.shipped()
    capabilities = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for kernel, capability, dtype, dim in product(get_args(Kernel), capabilities, dtypes, (8, 64, 80, 128, 192, 256)):
        tiling = table.tiling(kernel, capability=capability, dtype=dtype, head_dim=dim)
        assert not tiling.tma or (kernel == "prefill" and capability[0] in (9, 10))
    h100 = table.tiling("prefill", capability=(9, 0), dtype=torch.bfloat16, head_dim=128)
    assert (h100.rows, h100.keys, h100.tma) == (128, 128, True)
    root = Path(__file__).parents[3]
    for tile in table.entries:
        assert tile.source.endswith("not measured") or (root / tile.source).is_file(), tile.source


def test_the_nearest_entry_is_chosen() -> None:
    old, wide, narrow = entry(capability=(8, 0)), entry(head_dim=256, keys=64), entry(keys=128)
    table = TileTable((old, wide, narrow, entry(keys=16)))
    choose = lambda capability, dim: table.tiling(  # noqa: E731
        "prefill", capability=capability, dtype=torch.float16, head_dim=dim
    )
    assert choose((8, 9), 64) == old.tiling
    assert choose((9, 0), 129) == wide.tiling
    assert choose((10, 0), 100) == narrow.tiling == Tiling(64, 128, 4, 2)
    with pytest.raises(posenc.InvalidConfigError, match=r"no tile of kernel 'prefill' for 16-bit heads of 512"):
        choose((9, 0), 512)


def test_a_file_comes_before_the_shipped_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table as the sweep writes it is read back equal, and the backend uses it."""
    file = tmp_path / "tiles.json"
    table = TileTable((entry(keys=16, tma=True, source="docs/results/sweep.json"), entry(kernel="decode_kept")))
    table.write(file)
    assert TileTable.read(file).entries == table.entries
    monkeypatch.setenv(triton_tiles.VARIABLE, str(file))
    case = {"capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128}
    assert triton_tiles.in_force().tiling("prefill", **case) == table.entries[0].tiling
    raw = triton_tiles.in_force().tiling("decode_raw", **case)
    assert raw == TileTable.shipped().tiling("decode_raw", **case)
    monkeypatch.delenv(triton_tiles.VARIABLE)
    assert triton_tiles.in_force() is TileTable.shipped()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of tiles"),
        ('{"format": "posenc-tiles", "version": 2, "tiles": []}', "version"),
        (json.dumps({"format": "posenc-tiles", "version": 1, "tiles": [entry().model_dump() | {"rows": 65}]}), "rows"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(text)
    with pytest.raises(posenc.InvalidConfigError, match=rf"tiles\.json.*{message}.*POSENC_TRITON_TILES"):
        TileTable.read(file)
    with pytest.raises(posenc.InvalidConfigError, match="cannot be read"):
        TileTable.read(tmp_path / "none.json")


def test_the_kernels_go_first_where_they_are_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: in half precision, as measured; few queries of any kind, since one launch costs the host least."""
    from posenc.kernels.triton import backend as triton_backend

    backends = {name: info.backend for name, info in posenc.backends().items()}
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(TritonBackend, "priority", 5)
    for q_len, dtype, first in (
        (1, torch.float32, "triton"),
        (16, torch.float32, "triton"),
        (17, torch.float32, "xformers"),
        (17, torch.bfloat16, "triton"),
        (100, torch.float16, "triton"),
    ):
        q, k = (torch.empty(1, 2, tokens, 8, dtype=dtype) for tokens in (q_len, 100))
        assert max(backends, key=lambda name: backends[name].priority_for(q, k)) == first
