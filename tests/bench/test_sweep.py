"""The sweep of tiles: the candidates, which are right, which is fastest, and the table that the backend reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is available for Linux only")

from posenc.bench import sweep
from posenc.bench.sweep import Setting, candidates, shipped
from posenc.kernels.triton.backend import INTERPRETED, TritonBackend
from posenc.kernels.triton.tiles import TileTable, Tiling
from scripts import gpu_sweep
from scripts.gpu_process import Died

H100 = (9, 0)
PREFILL = Setting("prefill", "32/8x128", 32768, "bfloat16", "cuda")
SMALL = Setting("decode_raw", "4/2x16", 64, "float32", "cpu")


def test_the_shipped_tiling_comes_first_and_no_tiling_twice():
    for kernel in sweep.KERNELS:
        for shape in gpu_sweep.SHAPES:
            setting = Setting(kernel, shape, 32768, "bfloat16", "cuda")
            tilings = candidates(setting, H100, 24)
            assert tilings[0] == shipped(setting, H100)
            assert len(set(tilings)) == len(tilings) > 3
            assert not any(tiling.tma for tiling in tilings if kernel != "prefill")


def test_candidates_fit_shared_memory_and_the_gpu():
    tilings = candidates(PREFILL, H100, 100)
    assert {tiling.tma for tiling in tilings} == {True, False}
    for tiling in tilings[1:]:  # a query tile, and keys and values of every stage, two bytes each
        assert 2 * 128 * (tiling.rows + 2 * tiling.stages * tiling.keys) <= 227 * 1024
    assert not any(tiling.tma for tiling in candidates(PREFILL, (8, 0), 100))


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, and scripts.gpu_sweep itself tries them")
def test_a_tiling_that_leaves_memory_unwritten_is_wrong(monkeypatch: pytest.MonkeyPatch):
    tiling = asdict(shipped(SMALL, H100))
    outcome = sweep.verify(asdict(SMALL), tiling)
    assert outcome["good"], outcome
    assert len(sweep.one_round(asdict(SMALL), [tiling, tiling])) == 2
    real = TritonBackend.attend

    def attend(self: TritonBackend, *call: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = real(self, *call, **options)
        return torch.empty_like(out), lse

    monkeypatch.setattr(TritonBackend, "attend", attend)
    assert not sweep.verify(asdict(SMALL), tiling)["good"]


def test_the_fastest_tiling_replaces_the_shipped_one_only_beyond_noise():
    tilings = [Tiling(64, 64, 4, stages) for stages in (1, 2, 3)]
    slower_once = [[1.0, 0.99, 0.5], [1.0, 0.99, 1.5], [1.0, 0.99, 1.5]]
    assert sweep.best(slower_once, tilings) == (tilings[0], [1.0, 0.99, 1.5])
    assert sweep.best([[1.0, 1.2, 0.9]], tilings)[0] == tilings[2]


@dataclass
class Answers:
    """Processes of an H100: one tiling crashes, one is wrong, and those of the others with 4 warps are fastest."""

    asked: list[str] = field(default_factory=list)

    def ask(self, call: str, limit: float, **arguments: Any) -> Any:
        name = call.partition(":")[2]
        self.asked.append(name)
        if name == "describe":
            return {"gpu": "Made-Up GPU", "capability": list(H100)}
        if name == "one_round":
            return [0.5 if tiling["warps"] == 4 else 1.0 for tiling in arguments["tilings"]]
        tiling = arguments["tiling"]
        if (tiling["keys"], tiling["stages"]) == (32, 4):
            raise Died("the process ended (SIGSEGV)")
        return {"good": tiling["stages"] != 4, "output": 0.7, "lse": 0.0, "seconds": 1.0}

    def end(self) -> None:
        pass


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    class Pool(dict[str, Answers]):
        def __init__(self, names: list[str], *rest: object) -> None:
            super().__init__((name, Answers()) for name in names)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *rest: object) -> None:
            pass

    monkeypatch.setattr(gpu_sweep, "Workers", Pool)
    monkeypatch.setattr(gpu_sweep, "no_device", lambda device: None)
    monkeypatch.setattr(gpu_sweep, "SHAPES", {"32/8x128": {"prefill": 60, "decode": 20}})
    assert gpu_sweep.main(["--out", str(tmp_path)]) == 0
    return tmp_path


def test_the_table_makes_the_backend_use_the_best_tiling(swept: Path):
    table = TileTable.read(swept / "tiles.json")
    device = {"capability": H100, "dtype": torch.bfloat16}
    for kernel in sweep.KERNELS:
        shipped_tiling = TileTable.shipped().tiling(kernel, head_dim=128, **device)
        swept_tiling = table.tiling(kernel, head_dim=128, **device)
        assert swept_tiling.warps == 4
        assert swept_tiling.stages != 4
        assert (swept_tiling == shipped_tiling) is (shipped_tiling.warps == 4)
        wide_tiling = table.tiling(kernel, head_dim=256, **device)
        assert wide_tiling == TileTable.shipped().tiling(kernel, head_dim=256, **device)  # which was not swept
    (first, *_) = table.entries
    assert first.source == "sweep.json: 0.50 of the shipped tiling's time on Made-Up GPU"


def test_the_result_contains_every_time_and_every_problem(swept: Path):
    result = json.loads((swept / "sweep.json").read_text())
    assert [kernel["kernel"] for kernel in result["kernels"]] == list(sweep.KERNELS)
    assert all(tiling["median"] in (0.5, 1.0) for kernel in result["kernels"] for tiling in kernel["tilings"])
    for kernel in result["kernels"]:
        tilings = [tuple(sorted(tiling.items())) for tiling in kernel["tilings"]]
        assert len(tilings) == len(set(tilings)), "a tiling was timed twice"
    entries = [json.loads(line) for line in (swept / "sweep.jsonl").read_text().splitlines()]
    checked = [entry["checked"] for entry in entries if "checked" in entry]
    assert any(entry.get("problem") == "the process ended (SIGSEGV)" for entry in checked)
    assert any(entry["good"] is False and "problem" not in entry for entry in checked)
    assert sum("round" in entry for entry in entries) == 7 + 30 + 30


def test_without_a_gpu_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_sweep, "no_device", lambda device: "no CUDA GPU here")
    assert gpu_sweep.main(["--out", str(tmp_path)]) == 2
    assert not (tmp_path / "tiles.json").exists()
