"""Further ways in which the Triton kernels read keys: descriptors, cached rotated keys, pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import posenc
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Lengths, Segment
from posenc.testing.generators import banded_plan
from posenc.testing.tensors import AttentionCall, check_result, tensors

pytest.importorskip("triton", reason="triton is available for Linux only")

from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton import decode as triton_decode
from posenc.kernels.triton import prefill as triton_prefill
from posenc.kernels.triton import requests as triton_requests
from posenc.kernels.triton import rotate as triton_rotate
from posenc.kernels.triton.angles import (
    LEAST,
    RADIANS_PER_STEP,
    angles,
    key_angles,
    turns,
    whole_key_positions,
    whole_positions,
)
from posenc.kernels.triton.backend import TritonBackend
from posenc.kernels.triton.tables import prefill_tables
from posenc.kernels.triton.tiles import TileEntry, TileTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANS = {
    "lampe": posenc.strategy("lampe", window=64, mapping=40, head=8, tail=5),
    "dca": posenc.strategy("dca", window=64),
    "rerope": posenc.strategy("rerope", window=64),
    "leaky_rerope": posenc.strategy("leaky_rerope", window=64),
}


def entry(kernel: str, *, tma: bool = False, keys: int = 32) -> list[TileEntry]:
    common = {"capability": (8, 0), "head_dim": 256, "warps": 4, "stages": 2, "source": "a test"}
    rows = 64 if kernel == "prefill" else 16
    return [TileEntry(kernel=kernel, bits=bits, rows=rows, keys=keys, tma=tma, **common) for bits in (16, 32)]  # type: ignore[arg-type]


def backend(*, tma: bool) -> TritonBackend:
    return TritonBackend(
        TileTable((*entry("prefill", tma=tma), *entry("decode_kept", keys=16), *entry("decode_raw", keys=16)))
    )


def run(chosen: TritonBackend, call: AttentionCall, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen.attend(
        call.q, call.k, call.v, call.plan, call.rotary, scale=call.scale, mask=None, softcap=call.softcap, **options
    )


class TestDescriptors:
    """The variant for compute capability 9.0 and later."""

    @pytest.mark.parametrize("name", PLANS)
    def test_plans_are_exact(self, name: str, noted: list[bool]) -> None:
        plan, rotary = PLANS[name].plan(100, 110), Rotary.from_theta(1e4, 16)
        for q_len in (110, 31):
            q, k, v = tensors(plan, q_len, (2, 1), 16, batch=1, device=DEVICE)
            call = AttentionCall(q, k, v, plan, rotary, 0.25)
            check_result(name, call, *run(backend(tma=True), call), 2e-5)
        assert noted == [True, True]

    def test_odd_shapes_and_softcaps_are_exact(self) -> None:
        plan, rotary = banded_plan(60), Rotary.from_theta(1e3, 16, channels=(4, 20), style="interleaved")
        q, k, v = tensors(plan, 60, (4, 2), 24, batch=1, device=DEVICE)
        call = AttentionCall(q, k, v[..., :20], plan, rotary, 0.3, softcap=2.0)
        check_result("tma", call, *run(backend(tma=True), call), 2e-5)

    def test_values_that_descriptors_cannot_read_are_copied(self, noted: list[bool]) -> None:
        """Values with steps between channels or unaligned rows are copied; rows that stay unaligned use pointers."""
        plan, rotary = banded_plan(40), Rotary.from_theta(1e3, 8)
        q, k, v = tensors(plan, 40, (2, 1), 8, batch=1, device=DEVICE)
        odd = torch.zeros(*v.shape[:3], 9, device=DEVICE)
        odd[..., 1:] = v
        apart = torch.zeros(*v.shape[:3], 16, device=DEVICE)
        apart[..., ::2] = v
        for values, descriptors in (
            (odd[..., 1:], True),
            (apart[..., ::2], True),
            (v[..., :7], True),
            (v[..., :7].contiguous(), False),
        ):
            call = AttentionCall(q, k, values, plan, rotary, 0.3)
            check_result("tma", call, *run(backend(tma=True), call), 2e-5)
            assert noted.pop() == descriptors

    @pytest.fixture
    def noted(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """Whether each prefill used descriptors."""
        seen: list[bool] = []
        real = triton_prefill.prefill

        def prefill(*arguments: object) -> None:
            seen.append(arguments[-1].tma)  # type: ignore[attr-defined]
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(triton_prefill, "prefill", prefill)
        return seen


def test_heads_in_several_launches_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """For long inputs only the rotated rows of some heads are stored at a time."""
    monkeypatch.setattr(triton_prefill, "WAVES", 0.1)
    launches: list[object] = []
    real = triton_prefill._heads
    monkeypatch.setattr(triton_prefill, "_heads", lambda *args: (launches.append(args[0].shape[1]), real(*args)))
    plan, rotary = PLANS["lampe"].plan(130), Rotary.from_theta(1e4, 8)
    q, k, v = tensors(plan, 130, (6, 3), 8, batch=1, device=DEVICE)
    call = AttentionCall(q, k, v, plan, rotary, 0.3)
    check_result("triton", call, *run(backend(tma=False), call), 2e-5)
    assert launches == [4, 2]


def test_rotated_rows_take_about_one_copy_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """LaMPE on an H100 at 32,768 tokens and 32/8 heads has two long segments, and half of the heads run at a time."""
    monkeypatch.setattr(triton_prefill, "processors", lambda device: 132)
    plan, device = posenc.strategy("lampe", window=8192, mapping=6144).plan(32768), torch.device("cpu")
    tables = prefill_tables(plan, 32768, Rotary.from_theta(1e4, 16), device)
    assert tables is not None
    tiling = TileTable.shipped().tiling("prefill", capability=(9, 0), dtype=torch.bfloat16, head_dim=128)
    q = torch.empty(1, 32, 32768, 128, device="meta")
    at_once = triton_prefill._heads_at_once(q, 8, tables, tiling)
    copies = sum(copied.count for copied in tables.queries) / 32768
    assert 1.9 < copies < 2
    assert copies * at_once / 8 <= 1


def test_heads_that_share_a_look_up_of_angles_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three key heads and 18 query heads run in programs of eight."""
    monkeypatch.setattr(triton_rotate, "MANY_ROWS", 1)
    plan, rotary = PLANS["dca"].plan(40), Rotary.from_theta(1e4, 8)
    q, k, v = tensors(plan, 40, (18, 3), 8, batch=1, device=DEVICE)
    call = AttentionCall(q, k, v, plan, rotary, 0.3)
    check_result("triton", call, *run(backend(tma=False), call), 2e-5)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_decoding_with_cached_rotated_keys_is_exact(name: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one sequence read cached keys and rotate only new ones."""
    rotary = Rotary.from_theta(1e4, 12, style=style, channels=(2, 14))  # type: ignore[arg-type]
    whole, kept, rotated = PLANS[name].plan(90, 110), RotatedKeyCache(), []
    real = triton_rotate.rotate

    def rotate(x: torch.Tensor, *rest: object) -> None:
        rotated.append(x.shape[2])
        real(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_rotate, "rotate", rotate)
    q_all, k_all, v_all = tensors(whole, 110, (4, 2), 16, device=DEVICE)
    for total, new in ((90, 3), (91, 1), (94, 3)):
        rotated.clear()
        q, k, v = q_all[:, :, total - new : total], k_all[:, :, :total], v_all[:, :, :total]
        call = AttentionCall(q, k, v, whole.prefix(total), rotary, 0.25)
        check_result(f"{total} keys", call, *run(backend(tma=False), call, kept=kept), 2e-5)
    assert sum(rotated) <= 3 * 3  # of 94 keys in at most three maps
    assert kept.bytes > 0


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_computed_and_looked_up_angles_agree(scaling: float) -> None:
    """Positions far apart, negative, and halves, which are looked up; the factor on cos and sin counts twice."""
    index = np.arange(40)
    rotary = Rotary.from_theta(1e4, 12, channels=(2, 14), attention_scaling=scaling)
    for keys in (index * 4000 - 70_000, -index, index / 2):
        segment = Segment("all", index * 0, index + 1, index * 4000, keys)
        plan = PositionPlan.build(Lengths(40, 40), [segment])
        q, k, v = tensors(plan, 3, (4, 2), 16, device=DEVICE)
        call = AttentionCall(q, k, v, plan, rotary, 0.25)
        check_result("raw", call, *run(backend(tma=False), call), 2e-5)


def test_more_copies_than_a_launch_takes_fall_back_to_raw_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "MOST_COPIES", 1)
    plan, rotary, kept = PLANS["lampe"].plan(150), Rotary.from_theta(1e4, 8), RotatedKeyCache()
    q, k, v = tensors(plan, 2, (4, 2), 8, device=DEVICE)
    call = AttentionCall(q, k, v, plan, rotary, 0.25)
    check_result("raw", call, *run(backend(tma=False), call, kept=kept), 2e-5)
    assert kept.bytes == 0


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_a_plan_for_every_row_is_one_launch(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[object] = []
    real = triton_decode.decode
    monkeypatch.setattr(triton_decode, "decode", lambda *args, **kw: (launches.append(1), real(*args, **kw)))
    plans = [strategy.plan(80 - 9 * n, 90) for n, strategy in enumerate(PLANS.values())]
    plans[1] = replace(plans[1], query_scale=1 + np.arange(90) / 50)
    rotary = Rotary.from_theta(1e4, 8)
    q, k, v = tensors(plans[0], q_len, (4, 2), 8, batch=4, device=DEVICE)
    out, lse = posenc.attention(q, k, v, plans, rotary, backend="triton", scale=0.3, return_lse=True)
    for row, plan in enumerate(plans):
        own = slice(row, row + 1)
        check_result(f"row {row}", AttentionCall(q[own], k[own], v[own], plan, rotary, 0.3), out[own], lse[own], 2e-5)
    assert len(launches) == (1 if q_len <= 16 else 0)


class TestPages:
    """Requests of unequal length, each with its own plan, read keys and values from shuffled pages."""

    @pytest.mark.parametrize("page", [4, 16])
    def test_requests_are_exact(self, page: int) -> None:
        totals, counts = (83, 1, 150, 40), (3, 1, 5, 1)
        plans = [s.plan(max(1, n - 4), n) for s, n in zip(PLANS.values(), totals, strict=True)]
        self.check(plans, counts, page, Rotary.from_theta(1e4, 12, channels=(2, 14)))

    def test_a_request_without_new_tokens_is_skipped(self) -> None:
        plans = [PLANS["dca"].plan(70), PLANS["lampe"].plan(20), PLANS["rerope"].plan(90)]
        self.check(plans, (2, 0, 1), 8, Rotary.from_theta(1e4, 16))

    def check(self, plans: list[PositionPlan], counts: tuple[int, ...], page: int, rotary: Rotary) -> None:
        generator = torch.Generator().manual_seed(0)
        needed = [-(-plan.total // page) for plan in plans]
        order = torch.randperm(sum(needed) + 3, generator=generator)
        # Key and value of a slot are adjacent, as in vLLM; slots that no request owns hold NaN.
        both = torch.full((len(order), 2, page, 32), torch.nan, device=DEVICE)
        table = torch.full((len(plans), max(needed)), 10**6, dtype=torch.int32)
        calls, done = [], 0
        for row, (plan, count) in enumerate(zip(plans, counts, strict=True)):
            table[row, : needed[row]] = order[done : done + needed[row]]
            q, k, v = tensors(plan, max(count, 1), (4, 2), 16, batch=1, seed=row, device=DEVICE)
            slots = torch.arange(plan.total)
            pages = table[row, slots // page].long()
            both[pages, :, slots % page] = torch.cat((k, v), -1)[0].transpose(0, 1)
            calls.append(AttentionCall(q[:, :, :count], k, v, plan, rotary, 0.25))
            done += needed[row]
        q_THD = torch.cat([call.q[0].transpose(0, 1) for call in calls])
        k, v = both.split(16, -1)
        out, lse = backend(tma=False).attend_paged(q_THD, k, v, table.to(DEVICE), counts, plans, rotary, scale=0.25)
        for call, own, own_lse in zip(calls, out.split(counts), lse.split(counts), strict=True):
            if len(own):
                check_result("pages", call, own.transpose(0, 1)[None], own_lse.T[None], 2e-5)


def test_layers_share_the_tables_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = triton_requests._decode_tables
    monkeypatch.setattr(
        triton_requests, "_decode_tables", lambda *args: (made.append(1 + len(args[1])), real(*args))[1]
    )
    rotary, chosen = Rotary.from_theta(1e4, 8), backend(tma=False)
    roots = [strategy.plan(20, 30) for strategy in PLANS.values()]
    for total in (21, 22):
        plans = [root.prefix(total) for root in roots]
        q, k, v = tensors(plans[0], 1, (2, 1), 8, batch=len(plans), device=DEVICE)
        for _ in range(3):
            chosen.attend_rows(q, k, v, plans, rotary, scale=0.3, mask=None)
    chosen.attend_rows(q, k, v, [plans[0], *plans[:0:-1]], rotary, scale=0.3, mask=None)
    assert made == [4, 4, 4]


class TestAngles:
    def test_one_table_serves_all_maps(self) -> None:
        rotary, device = Rotary.from_theta(1e4, 8), torch.device("cpu")
        near = angles(np.arange(100), rotary, device)
        assert near.cos_RF.data_ptr() == angles(np.arange(99), rotary, device).cos_RF.data_ptr()
        far = angles(np.arange(50) // 8 - 3, rotary, device)
        again = angles(np.arange(2 * LEAST), rotary, device)
        assert len(again.cos_RF) == 3 * LEAST  # the table has grown on both sides
        for found, positions in ((near, np.arange(100)), (far, np.arange(50) // 8 - 3)):
            cos, sin = rotary.tables(positions)
            assert torch.equal(found.cos_RF[found.rows_L.long()], cos)
            assert torch.equal(found.sin_RF[found.rows_L.long()], sin)
            assert found.rows_L.dtype == torch.int32

    def test_changed_frequencies_have_another_table(self) -> None:
        rotary = Rotary.from_theta(1e4, 8)
        angles(np.arange(9), rotary, torch.device("cpu"))
        rotary.inv_freq.mul_(0.5)
        found = angles(np.arange(9), rotary, torch.device("cpu"))
        assert torch.equal(found.cos_RF[found.rows_L.long()], rotary.tables(np.arange(9))[0])

    @pytest.mark.parametrize("positions", [np.arange(9) / 3, np.arange(9) * 10**7, np.ones((9, 4)) * 0.5])
    def test_fractional_or_distant_positions_have_a_table_by_token(self, positions: np.ndarray) -> None:
        rotary = Rotary.from_theta(1e4, 8)
        found = angles(positions, rotary, torch.device("cpu"))
        assert torch.equal(found.cos_RF, rotary.tables(positions)[0])
        assert found.rows_L.tolist() == list(range(9))

    @pytest.mark.parametrize("theta", [10.0, 1e4, 1e8])
    def test_computed_angles_are_exact_for_any_int32(self, theta: float) -> None:
        """As the kernel computes them: an int32 product that overflows, and float32 for the rest."""
        rotary, generator = Rotary.from_theta(theta, 128), np.random.default_rng(0)
        turns_F, rest_F = (x.numpy() for x in turns(rotary, torch.device("cpu")))
        ends = np.array([0, 1, -1, 131_071, 10**6, 2**31 - 1, -(2**31) + 1])
        position_L = np.concatenate((ends, generator.integers(-(2**31), 2**31, 2000))).astype(np.int32)
        phase_LF = (position_L[:, None] * turns_F).astype(np.float32)
        angle_LF = phase_LF * np.float32(RADIANS_PER_STEP) + position_L.astype(np.float32)[:, None] * rest_F
        assert turns_F.dtype == np.int32
        assert angle_LF.dtype == np.float32
        assert np.abs(angle_LF).max() < 2 * np.pi  # the range that the GPU's instructions are made for
        for found_LF, expected_LF in zip((np.cos, np.sin), rotary.tables(position_L, dtype=torch.float64), strict=True):
            assert np.abs(found_LF(angle_LF.astype(np.float64)) - expected_LF.numpy()).max() < 1e-6

    def test_angles_are_computed_for_whole_positions_only(self) -> None:
        index, device = np.arange(9), torch.device("cpu")
        for positions, whole in ((index * 10**8, True), (-index, True), (index / 2, False), (index * 10**9, False)):
            found = whole_key_positions(Segment("a", index * 0, index + 1, index, positions), device)
            assert (None if found is None else found.tolist()) == (positions.tolist() if whole else None)

    def test_integer_positions_are_recognized(self) -> None:
        assert whole_positions(np.array([0.0, 3.0])).tolist() == [0, 3]  # type: ignore[union-attr]
        assert whole_positions(np.array([0.5])) is None
        assert whole_positions(np.zeros((2, 3))) is None

    def test_memory_of_a_map_is_four_bytes_per_key(self) -> None:
        """For LaMPE at 8,192 tokens and head_dim 128 the maps share one table of 8 bytes per position and frequency."""
        plan, rotary = posenc.strategy("lampe", window=2048, mapping=1536).plan(8192), Rotary.from_theta(1e4, 128)
        found = [key_angles(segment, rotary, torch.device("cpu"))[0] for segment in plan.segments]
        tables = {x.cos_RF.data_ptr(): x.cos_RF.nbytes + x.sin_RF.nbytes for x in found}
        assert sum(tables.values()) == 8 * 64 * 8192
        assert sum(x.rows_L.nbytes for x in found) == 4 * 8192 * len(plan.segments) == 3 * 4 * 8192
