"""Rotated keys cached between decoding steps always match the raw keys, and a step rotates only new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, StaticCache

import posenc
from posenc.hf.cache.rotated_keys import RotatedKeys
from posenc.hf.cache.state import CacheState
from posenc.kernels.cpu import decode_calls
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.rope import Rotary
from tests.hf import tiny

WINDOW, PROMPT, STEPS = 64, 150, 40
STRATEGIES = {
    "lampe": {"mapping": 40, "head": 12, "tail": 6},
    "self_extend": {"group": 4, "window_size": 16},
    "rerope": {"window_size": 16},
    "leaky_rerope": {"window_size": 16},
    "dca": {"chunk_size": 24, "local_size": 8},
    "string": {"shift": 20, "window_size": 8},
    "lm_infinite": {"window_size": 16, "sinks": 4},
    "streaming_llm": {"window_size": 16, "sinks": 4},
}
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("new", [1, 3])
def test_every_step_equals_the_reference(name: str, new: int) -> None:
    strategy = posenc.strategy(name, window=WINDOW, **STRATEGIES[name])
    rotary, kept = Rotary.from_theta(1e4, 16), RotatedKeyCache()
    torch.manual_seed(0)
    total = PROMPT + new * STEPS
    q, k, v = torch.randn(2, 4, total, 16), torch.randn(2, 2, total, 16), torch.randn(2, 2, total, 16)
    whole = strategy.plan(PROMPT, total)
    for length in range(PROMPT + new, total + 1, new):
        case = q[:, :, length - new : length], k[:, :, :length], v[:, :, :length], whole.prefix(length), rotary
        got = posenc.attention(*case, backend="cpu_flash", kept=kept)
        expected = posenc.attention(*case, backend="reference")
        assert (got - expected).abs().max() < TOLERANCE, length


def test_a_change_of_interpolation_is_detected() -> None:
    lengths = posenc.Lengths(60, 60)
    index = lengths.indices
    rotary, kept = Rotary.from_theta(1e4, 16), RotatedKeyCache()
    q, k, v = torch.randn(3, 1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    for kind in ("positions", "logits", "logits", "positions"):
        segment = posenc.Segment.band("all", 60, 0, None, index, index / 7, kind)
        case = q[:, :, -1:], k, v, posenc.PositionPlan.build(lengths, [segment]), rotary
        got = posenc.attention(*case, backend="cpu_flash", kept=kept)
        assert (got - posenc.attention(*case, backend="reference")).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("few", [0, 10, 30, 1000])
def test_steps_back_and_forth_equal_the_reference(name: str, few: int) -> None:
    """Assisted generation takes candidates back; short segments reuse the memory of keys that return."""
    strategy = posenc.strategy(name, window=WINDOW, **STRATEGIES[name])
    rotary, kept = Rotary.from_theta(1e4, 16), RotatedKeyCache()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 400, 16, generator=generator) for heads in (4, 2, 2))
    whole = strategy.plan(PROMPT, 400)
    for length in (151, 152, 160, 153, 154, 151, 200, 201, 202, 180, 181, 399, 160, 161):
        kept.truncate(length - 1)
        k[:, :, length - 1 :] += 1.0
        case = q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length], whole.prefix(length), rotary
        with mock.patch.object(decode_calls, "GRAIN", few * 2 * 16):
            got = posenc.attention(*case, backend="cpu_flash", kept=kept)
        assert (got - posenc.attention(*case, backend="reference")).abs().max() < TOLERANCE, length


@pytest.fixture
def rotated_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of ``Rotary.rotate`` rotates."""
    counts: list[int] = []
    rotate = Rotary.rotate

    def counting(self: Rotary, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(x.shape[2])
        return rotate(self, x, *args, **kwargs)

    monkeypatch.setattr(Rotary, "rotate", counting)
    return counts


@pytest.mark.parametrize("name", ["lampe", "self_extend", "rerope", "leaky_rerope", "dca", "string"])
@pytest.mark.parametrize("few", [0, 16 * 20])
def test_a_step_rotates_only_new_tokens_and_short_segments(name: str, few: int, rotated_tokens: list[int]) -> None:
    strategy = posenc.strategy(name, window=WINDOW, **STRATEGIES[name])
    rotary, kept = Rotary.from_theta(1e4, 16), RotatedKeyCache()
    x = torch.randn(1, 1, PROMPT + 9, 16)
    whole = strategy.plan(PROMPT, PROMPT + 9)
    counts = []
    for length in range(PROMPT + 1, PROMPT + 10):
        rotated_tokens.clear()
        keys = x[:, :, :length]
        with mock.patch.object(decode_calls, "GRAIN", few):
            posenc.attention(keys[:, :, -1:], keys, keys, whole.prefix(length), rotary, kept=kept)
        counts.append(sum(rotated_tokens))
    assert counts[0] <= 2 * PROMPT
    neighbours = 8 * 2 * few // 16  # at most, at the two ends
    assert sum(counts[1:]) <= 60 + neighbours  # of at least 8 * 150 without anything kept; some are rotated ahead
    assert kept.bytes >= (0 if name == "rerope" else PROMPT * 16 * 4)


def test_another_plan_or_rotary_is_detected() -> None:
    x, kept = torch.randn(1, 1, 100, 16), RotatedKeyCache()
    rotary, other = Rotary.from_theta(1e4, 16), Rotary.from_theta(1e5, 16)
    plans = [posenc.strategy("lampe", window=WINDOW, mapping=m, head=12, tail=6).plan(90, 100) for m in (40, 30)]
    for plan, own in ((plans[0], rotary), (plans[1], rotary), (plans[1], other), (plans[0], rotary)):
        case = x[:, :, -1:], x, x, plan, own
        got = posenc.attention(*case, kept=kept)
        assert (got - posenc.attention(*case, backend="reference")).abs().max() < TOLERANCE


def test_truncated_keys_are_rotated_again() -> None:
    plan = posenc.strategy("lampe", window=WINDOW, mapping=40, head=12, tail=6).plan(90, 100)
    rotary, kept = Rotary.from_theta(1e4, 16), RotatedKeyCache()
    x = torch.randn(1, 1, 100, 16)
    posenc.attention(x[:, :, -1:], x, x, plan, rotary, kept=kept)
    x[:, :, 95:] = torch.randn(1, 1, 5, 16)
    kept.truncate(95)
    case = x[:, :, -1:], x, x, plan, rotary
    got = posenc.attention(*case, kept=kept)
    assert (got - posenc.attention(*case, backend="reference")).abs().max() < TOLERANCE
    kept.clear()
    assert kept.bytes == 0


@pytest.fixture(params=["as it is", "no short segments"])
def grain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most segments of a tiny model are short and computed with a neighbour; with a grain of 1 all have copies."""
    if request.param == "no short segments":
        monkeypatch.setattr(decode_calls, "GRAIN", 1)


def step(model: Any, cache: Any, token: int, rows: int = 1) -> torch.Tensor:
    return model(torch.full((rows, 1), token), past_key_values=cache).logits[:, -1]


def reorder(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def overwrite(cache: Any) -> None:
    cache.layers[1].keys[0, :, 5] += 1.0


def replace(cache: Any) -> None:
    cache.layers[0].keys = cache.layers[0].keys.flip(0)


def nothing(cache: Any) -> None:
    pass


@pytest.mark.usefixtures("grain")
@pytest.mark.parametrize("change", [nothing, reorder, overwrite, replace])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["lampe", "rerope", "self_extend"])
def test_a_changed_cache_is_detected(change: Callable[[Any], None], kind: str, name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, PROMPT)
    with torch.no_grad():
        outcomes = []
        for mode in ("rotated", "raw"):
            with posenc.apply(model, name, cache=mode, window=WINDOW, **STRATEGIES[name]):
                cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=PROMPT + 9)
                model(ids, past_key_values=cache)
                logits = [step(model, cache, 3, 2), step(model, cache, 4, 2)]
                change(cache)
                logits += [step(model, cache, 5, 2), step(model, cache, 6, 2)]
                outcomes.append(torch.stack(logits))
                assert (CacheState.of(cache).rotated is not None) == (mode == "rotated")
    assert (outcomes[0] - outcomes[1]).abs().max() < 1e-4


@pytest.mark.usefixtures("grain")
@pytest.mark.parametrize("name", ["lampe", "rerope", "self_extend", "dca"])
@pytest.mark.parametrize("left", [0, 17])
def test_crops_of_padded_rows_are_exact(name: str, left: int) -> None:
    """Candidates are taken back; copies omit the padding, so they are cut to fewer tokens than the cache."""
    model, ids = tiny.make("llama"), tiny.tokens(2, PROMPT)
    mask = torch.ones(2, PROMPT + 40, dtype=torch.long)
    mask[0, :left] = 0
    with torch.no_grad():
        outcomes = []
        for mode in ("rotated", "raw"):
            with posenc.apply(model, name, cache=mode, window=WINDOW, **STRATEGIES[name]):
                cache, logits = DynamicCache(), []

                def decode(*tokens: int, cache: Any = cache, logits: Any = logits) -> None:
                    for token in tokens:
                        seen = mask[:, : cache.get_seq_length() + 1]
                        new = torch.full((2, 1), token)
                        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -1:]
                        own = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
                        logits.append(model(new, **own).logits[:, -1])

                whole = {"attention_mask": mask[:, :PROMPT], "past_key_values": cache}
                positions = (mask[:, :PROMPT].cumsum(1) - 1).clamp(min=0)
                model(ids, position_ids=positions, **whole)
                decode(3, 4, 5, 6, 7)
                cache.crop(-3)
                decode(8, 9)
                cache.crop(-1)
                decode(10, 11)
                outcomes.append(torch.stack(logits))
    assert (outcomes[0] - outcomes[1]).abs().max() < 1e-4


@pytest.mark.usefixtures("grain")
def test_copies_and_crops_of_a_cache_are_exact() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    with torch.no_grad():
        outcomes = []
        for mode in ("rotated", "raw"):
            with posenc.apply(model, "lampe", cache=mode, window=WINDOW, **STRATEGIES["lampe"]):
                cache = DynamicCache()
                model(ids, past_key_values=cache)
                logits = [step(model, cache, token) for token in (3, 4, 5, 6)]
                other = copy.deepcopy(cache)
                cache.crop(-2)
                logits += [step(model, cache, 7), step(model, other, 8), step(model, cache, 9), step(model, other, 9)]
                outcomes.append(torch.stack(logits))
    assert (outcomes[0] - outcomes[1]).abs().max() < 1e-4


def test_a_crop_keeps_the_remaining_rotated_keys(rotated_tokens: list[int]) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    with torch.no_grad(), posenc.apply(model, "lampe", window=WINDOW, **STRATEGIES["lampe"]):
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for token in (3, 4, 5):
            step(model, cache, token)
        cache.crop(-2)
        rotated_tokens.clear()
        step(model, cache, 7)
        assert sum(rotated_tokens) < PROMPT


def test_memory_is_as_documented() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 2000)
    with torch.no_grad():
        for mode in ("rotated", "raw"):
            with posenc.apply(model, "lampe", cache=mode, window=WINDOW, **STRATEGIES["lampe"]):
                cache = DynamicCache()
                model(ids, past_key_values=cache)
                step(model, cache, 3)
                raw = sum(layer.keys.nbytes for layer in cache.layers)
                if mode == "raw":
                    assert CacheState.of(cache).rotated is None
                    continue
                held = CacheState.of(cache).rotated.bytes
                assert raw <= held <= 1.6 * raw  # room for growth is a large part of a short cache
                model(ids[:, :50], past_key_values=cache)  # a new turn
                assert CacheState.of(cache).rotated is None


@pytest.mark.usefixtures("grain")
def test_nothing_is_cached_in_inference_mode() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    with torch.inference_mode(), posenc.apply(model, "lampe", window=WINDOW, **STRATEGIES["lampe"]):
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        step(model, cache, 3)
        cache.layers[1].keys[0, :, 5] += 1.0
        got = step(model, cache, 4)
    with torch.inference_mode(), posenc.apply(model, "lampe", cache="raw", window=WINDOW, **STRATEGIES["lampe"]):
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        step(model, cache, 3)
        cache.layers[1].keys[0, :, 5] += 1.0
        assert (got - step(model, cache, 4)).abs().max() < 1e-4


def test_a_wrong_mode_is_refused() -> None:
    with pytest.raises(posenc.InvalidConfigError, match="rotated, raw"):
        posenc.apply(tiny.make("llama"), "lampe", cache="rotten")  # type: ignore[arg-type]


def test_layers_that_share_a_module_cache_nothing() -> None:
    store = RotatedKeys()
    store.check(None, 5)
    assert store.serves(0)
    store.of(0, (0,), padding=0)
    assert not store.serves(0)  # the same layer number again, for other keys
    store.check(None, 6)
    assert not store.serves(0)
    assert store.serves(1)


def test_raw_keys_that_are_written_to_unseen_need_a_cache_of_raw_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented, writes through ``.data`` go unnoticed with rotated copies, and are seen with ``cache="raw"``."""
    monkeypatch.setattr(decode_calls, "GRAIN", 1)
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    found = {}
    with torch.no_grad():
        for way in ("rotated", "dropped", "raw", "raw, seen"):
            mode: Any = way.split(",")[0].replace("dropped", "rotated")
            with posenc.apply(model, "self_extend", cache=mode, window=WINDOW, **STRATEGIES["self_extend"]):
                cache = DynamicCache()
                model(ids, past_key_values=cache)
                step(model, cache, 3)
                keys = cache.layers[1].keys
                (keys if way == "raw, seen" else keys.data)[0, :, 5] += 1.0
                if way == "dropped":
                    CacheState.of(cache).rotated = None
                found[way] = step(model, cache, 4)
    assert torch.equal(found["raw"], found["raw, seen"])
    assert (found["dropped"] - found["raw"]).abs().max() < 1e-4
    assert (found["rotated"] - found["raw"]).abs().max() > 1e-4
