"""Both sides of every kind compute the same function, and a remapped side computes the remap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import posenc
from posenc.bench.cases import KINDS, PADDED
from posenc.bench.model import make_model, twin
from posenc.bench.settings import BenchSettings
from posenc.bench.shapes import Heads
from posenc.bench.sides import build
from posenc.bench.timing import LEAST_ROUNDS, Pair, measure
from posenc.errors import InvalidInputError
from tests.bench.conftest import small


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PADDED])
def test_with_the_identity_plan_both_sides_are_equal(kind: str):
    pair = build(small(kind, strategy="rope"))
    with torch.no_grad():
        for _ in range(3):  # a growing cache must stay in step
            plain, remapped = pair.plain(), pair.remapped()
            torch.testing.assert_close(plain, remapped, atol=2e-5, rtol=1e-5)
    assert plain.abs().max() > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PADDED])
def test_a_remap_acts_beyond_the_window(kind: str):
    pair = build(small(kind))
    with torch.no_grad():
        assert not torch.allclose(pair.plain(), pair.remapped(), atol=1e-4)


@pytest.mark.parametrize("kind", PADDED)
def test_a_padded_batch_computes_its_rows(kind: str):
    pair = build(small(kind))
    with torch.no_grad():
        rows = pair.plain()
        assert rows.shape[0] == 4
        torch.testing.assert_close(rows, pair.remapped(), atol=2e-5, rtol=1e-5)


def test_one_query_over_raw_keys_equals_the_plan():
    pair = build(small("query"))
    q, k, v = (vars(pair.plain)[name] for name in ("q_BHLD", "k_BHLD", "v_BHLD"))
    plan = posenc.strategy("rerope", window=16).plan(64)
    assert plan.query_scale is not None
    base = posenc.Rotary.from_theta(1e4, 16)
    logits = torch.empty(4, 64)
    for key, relative in enumerate(plan.relative_positions()[-1]):
        turned = base.rotate(q, *base.tables(np.array([relative])))[0, :, 0]
        logits[:, key] = (turned * k[0, :, key].repeat_interleave(2, 0)).sum(-1) / 4
    weights = (logits * float(plan.query_scale[-1])).softmax(-1)
    expected = torch.einsum("hk,hkd->hd", weights, v[0].repeat_interleave(2, 0))
    torch.testing.assert_close(pair.remapped()[0, :, 0], expected, atol=2e-5, rtol=1e-5)


def test_decoding_reads_the_whole_cache_and_appends():
    pair = build(small("decode"))
    decode = pair.remapped
    with torch.no_grad():
        decode()
    assert decode.cache.get_seq_length() == 65  # type: ignore[attr-defined]
    assert len(decode.model.model.layers) == 2  # type: ignore[attr-defined]  # removed and put back


def test_twins_share_only_their_weights():
    model = make_model(small("prefill"))
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert model.config is not other.config
    with posenc.apply(other, "rerope"):
        assert model.config._attn_implementation == "sdpa"
        assert posenc.attached(model) is None


def test_the_two_sides_are_measured_in_turns():
    calls: list[str] = []

    def side(name: str):
        return lambda: calls.append(name) or torch.zeros(1)

    timing = measure(Pair(side("plain"), side("remapped")), rounds=5, seconds=60)
    assert calls == ["plain", "remapped"] * 6  # the first call of each is not counted
    assert len(timing.plain) == len(timing.remapped) == 5
    assert len(measure(Pair(side("plain"), side("remapped")), rounds=5, seconds=0).plain) == LEAST_ROUNDS


def test_cases_are_every_combination():
    settings = BenchSettings(
        kinds=("attention", "prefill"), strategies=("rope", "dca"), lengths=(64, 128), heads=("4/2x16", "2/1x8")
    )
    cases = settings.cases()
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 + 2 * 2
    assert {case.window for case in cases} == {16, 32}
    settings.check()


@pytest.mark.parametrize("text", ["9x3x64", "9/3", "9/2x64", "0/1x8", "4/2x7", "a/bxc"])
def test_impossible_heads_are_refused(text: str):
    with pytest.raises(InvalidInputError, match="heads"):
        Heads.parse(text)
