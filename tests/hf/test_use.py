"""Remapped models in use: generation, turns, several models, copies, gradients, memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import posenc
from posenc.hf.cache.state import CacheState
from posenc.hf.hooks import HOOKS
from posenc.kernels.cpu.backend import CpuFlashBackend
from tests.hf import tiny
from tests.hf.dense import dense_logits
from tests.hf.tiny import LAMPE


def padded() -> dict[str, torch.Tensor]:
    ids = tiny.tokens(3, 80)
    mask = torch.ones_like(ids)
    mask[0, :30], mask[1, :69] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_greedy_and_prompt_lookup_give_the_same_tokens() -> None:
    for seed in range(4):
        model = tiny.make("llama", seed)
        ids = tiny.tokens(1, 17, seed=seed).repeat(1, 3)
        # 51 tokens, window 64: generation crosses the window, so a new plan is made on the way
        with posenc.apply(model, "lampe", **LAMPE):
            greedy = model.generate(ids, do_sample=False, max_new_tokens=60)
            lookup = model.generate(ids, do_sample=False, max_new_tokens=60, prompt_lookup_num_tokens=5)
        assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("drafts", ["patched drafter", "stock drafter"])
@pytest.mark.parametrize("target", ["patched target", "stock target"])
def test_an_assistant_model_changes_nothing(target: str, drafts: str) -> None:
    model, drafter = tiny.make("llama"), tiny.make("llama")
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    ids, calls = tiny.tokens(1, 70), []
    drafter.register_forward_hook(lambda *_: calls.append(1))
    with contextlib.ExitStack() as patches:
        if target == "patched target":
            patches.enter_context(posenc.apply(model, "self_extend", group=4, window_size=16))
        if drafts == "patched drafter":
            patches.enter_context(posenc.apply(drafter, "rerope", window_size=9))
        calls.clear()
        greedy = model.generate(ids, do_sample=False, max_new_tokens=25)
        assert not calls
        assert torch.equal(model.generate(ids, assistant_model=drafter, do_sample=False, max_new_tokens=25), greedy)
        assert calls


def test_candidates_are_not_a_new_turn_but_a_prompt_is() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 90)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        one_by_one, at_once, turn = (DynamicCache(config=model.config) for _ in range(3))
        for cache in (one_by_one, at_once, turn):
            model(ids[:, :80], past_key_values=cache)
        decoded = torch.cat([model(ids[:, i : i + 1], past_key_values=one_by_one).logits for i in range(80, 90)], 1)
        candidates = model(ids[:, 80:], past_key_values=at_once, logits_to_keep=10).logits
        new_turn = model(ids[:, 80:], past_key_values=turn).logits
    assert (decoded - candidates).abs().max() < 1e-4
    assert (decoded - new_turn).abs().max() > 1e-3


def test_scoring_with_logits_to_keep_counts_as_a_prompt() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 90)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE) as handle:
        whole = model(ids).logits[:, -30:]
        assert (model(ids, logits_to_keep=30).logits - whole).abs().max() < 1e-6
        with handle.prompt_length(90):
            cached = model(ids, logits_to_keep=30, past_key_values=DynamicCache(config=model.config)).logits
        assert (cached - whole).abs().max() < 1e-6


@pytest.mark.parametrize("strategy", [("lampe", LAMPE), ("dca", {"chunk_size": 40, "local_size": 12})])
def test_all_caches_agree_in_generate(strategy: tuple[str, dict[str, Any]]) -> None:
    for family in ("llama", "mistral_sliding"):
        model = tiny.make(family)
        with posenc.apply(model, strategy[0], **strategy[1]):
            dynamic = model.generate(**padded(), do_sample=False, max_new_tokens=12)
            static = model.generate(**padded(), do_sample=False, max_new_tokens=12, cache_implementation="static")
            alone = [
                model.generate(ids[mask.bool()][None], do_sample=False, max_new_tokens=12)[0, -12:]
                for ids, mask in zip(*padded().values(), strict=True)
            ]
        assert torch.equal(dynamic, static)
        assert torch.equal(dynamic[:, -12:], torch.stack(alone))


def test_right_padded_rows_count_their_own_tokens() -> None:
    model, strategy = tiny.make("llama"), posenc.strategy("lampe", window=tiny.WINDOW, **LAMPE)
    ids, mask = tiny.tokens(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[0, 50:] = 0
    with torch.no_grad(), posenc.apply(model, strategy):
        logits = model(ids, attention_mask=mask).logits
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for row, length in ((0, 50), (1, 80)):
        expected = dense_logits(model, ids[row, :length], tiny.positions(model, strategy, length, length))
        assert (logits[row, :length] - expected).abs().max() < 1e-4
    grown = torch.cat((ids[0, :50], out.sequences[0, 80:82]))
    expected = dense_logits(model, grown, tiny.positions(model, strategy, 50, 52))
    assert (out.logits[1][0] - expected[50]).abs().max() < 1e-4
    assert (out.logits[2][0] - expected[51]).abs().max() < 1e-4


def test_beam_scores_are_those_of_the_dense_decoder() -> None:
    model, strategy = tiny.make("llama"), posenc.strategy("lampe", window=tiny.WINDOW, replan="never", **LAMPE)
    ids = tiny.tokens(2, 70)
    with posenc.apply(model, strategy):
        out = model.generate(
            ids,
            num_beams=4,
            do_sample=False,
            max_new_tokens=9,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
    for row in range(2):
        sequence = out.sequences[row]
        logits = dense_logits(model, sequence, tiny.positions(model, strategy, 70, 79))
        score = logits[69:-1].log_softmax(-1).gather(1, sequence[70:, None]).sum()
        assert abs(float(score) - float(out.sequences_scores[row])) < 1e-3


def test_long_generation_stays_inside_the_window() -> None:
    model = tiny.make("llama")
    seen: list[float] = []
    ids = tiny.tokens(1, 10)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE) as handle:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        for i in range(10, 150):
            model(tiny.tokens(1, 1, seed=i), past_key_values=cache)
            (row,) = CacheState.of(cache).record.rows
            seen.append(handle.plan(row.schedule.prompt_at(row.length), row.length).max_relative)
    assert max(seen) < tiny.WINDOW
    assert len(row.schedule.entries) > 1


@pytest.mark.parametrize(("rule", "prompts"), [("never", {70}), (10, {70, 80, 90, 100})])
def test_the_replan_rule_decides_when_plans_are_made(rule: Any, prompts: set[int]) -> None:
    model = tiny.make("llama")
    with torch.no_grad(), posenc.apply(model, "lampe", replan=rule, **LAMPE):
        cache = DynamicCache(config=model.config)
        model(tiny.tokens(1, 70), past_key_values=cache)
        for i in range(35):
            model(tiny.tokens(1, 1, seed=i), past_key_values=cache)
    assert {prompt for _, prompt in CacheState.of(cache).record.rows[0].schedule.entries} == prompts


def test_a_cropped_cache_continues() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 100)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        cache, straight = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids[:, :80], past_key_values=cache)
        for i in range(80, 90):
            model(ids[:, i : i + 1], past_key_values=cache)
        cache.crop(-8)
        model(ids[:, :80], past_key_values=straight)
        for i in (80, 81):
            model(ids[:, i : i + 1], past_key_values=straight)
        again = model(ids[:, 95:96], past_key_values=cache).logits
        assert (again - model(ids[:, 95:96], past_key_values=straight).logits).abs().max() < 1e-6


def test_the_cache_stores_raw_keys_once() -> None:
    model, ids = tiny.make("qwen2"), tiny.tokens(2, 70)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        cache = model(ids, use_cache=True).past_key_values
    raw = model.model.layers[0].self_attn.k_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
    assert torch.equal(cache.layers[0].keys, raw.view(2, 70, 2, 16).transpose(1, 2))
    stock = model(ids, use_cache=True).past_key_values
    for layer, plain in zip(cache.layers, stock.layers, strict=True):
        assert layer.keys.shape == plain.keys.shape
        assert {name for name, x in vars(layer).items() if isinstance(x, torch.Tensor)} == {
            name for name, x in vars(plain).items() if isinstance(x, torch.Tensor)
        }


def test_models_patched_differently_may_share_a_config() -> None:
    first = tiny.make("llama")
    second = type(first)(first.config).eval()
    ids = tiny.tokens(1, 80)
    with torch.no_grad():
        stock = [m(ids).logits for m in (first, second)]
        one = posenc.apply(first, "lampe", **LAMPE)
        assert torch.equal(second(ids).logits, stock[1])
        other = posenc.apply(second, "rerope", window_size=9)
        mixed = [m(ids).logits for m in (first, second)]
        one.remove()
        assert torch.equal(first(ids).logits, stock[0])
        assert torch.equal(second(ids).logits, mixed[1])
        assert torch.equal(first(ids).logits, stock[0])
        other.remove()
        assert torch.equal(second(ids).logits, stock[1])
    assert not torch.equal(mixed[0], stock[0])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copier: Any) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    with torch.no_grad():
        stock = model(ids).logits
        handle = posenc.apply(model, "lampe", **LAMPE)
        patched = model(ids).logits
        twin = copier(model)
        handle.remove()
        assert torch.equal(model(ids).logits, stock)
        assert torch.equal(twin(ids).logits, patched)
        copied = posenc.attached(twin)
        assert copied is not None
        assert copied.strategy.describe() == handle.strategy.describe()
        copied.remove()
        assert torch.equal(twin(ids).logits, stock)


def test_the_strategy_is_removed_after_an_exception() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    with torch.no_grad():
        stock = model(ids).logits
        with pytest.raises(ZeroDivisionError), posenc.apply(model, "lampe", **LAMPE):
            model(ids[: 1 // 0])
        assert torch.equal(model(ids).logits, stock)
        with pytest.raises(posenc.BackendError), posenc.apply(model, "lampe", **LAMPE):
            model(ids, output_attentions=True)
        assert torch.equal(model(ids).logits, stock)
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            assert not isinstance(hook, HOOKS)


def test_bfloat16_is_close_to_float32() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        exact = model(ids).logits
        error = (model.bfloat16()(ids).logits.float() - exact).abs().mean() / exact.abs().mean()
    assert error < 0.1


def test_gradients_are_exact_with_and_without_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model, ids = tiny.make("llama").train(), tiny.tokens(2, 70)
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable()
        with posenc.apply(model, "lampe", **LAMPE):
            model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert bool((grads[0] != 0).any())
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    model, strategy = tiny.make("llama"), posenc.strategy("lampe", window=tiny.WINDOW, **LAMPE)
    at, ids = tiny.positions(model, strategy, 70, 70), tiny.tokens(1, 70)
    weight = model.model.layers[0].self_attn.k_proj.weight
    with posenc.apply(model, strategy):
        loss = model(ids).logits.log_softmax(-1)[0, :, 3].sum()
        (got,) = torch.autograd.grad(loss, weight)
        step = torch.randn_like(weight) * 1e-4
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
                losses.append(float(dense_logits(model, ids[0], at).log_softmax(-1)[:, 3].sum()))
                weight.sub_(sign * step)
    assert (losses[0] - losses[1]) / 2 == pytest.approx(float((got * step).sum()), rel=1e-2)


def test_save_pretrained_is_unaffected(tmp_path: Path) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        patched = model(ids).logits
        model.save_pretrained(tmp_path / "after")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
        loaded = posenc.from_pretrained(tmp_path / "after", {"name": "lampe", **LAMPE})
        assert torch.equal(loaded(ids).logits, patched)
        again = posenc.from_pretrained(tmp_path / "after")
        assert torch.equal(again(ids).logits, patched)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert posenc.attached(plain) is None


def test_every_form_of_a_configuration_is_accepted(tmp_path: Path) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    file = tmp_path / "posenc.yaml"
    file.write_text("strategy: {name: lampe, head: 8, tail: 5, mapping: 30}\nbackend: cpu_flash\n")
    forms: list[Any] = [
        file,
        str(file),
        posenc.load_config(file),
        {"name": "lampe", **LAMPE},
        {"strategy": {"name": "lampe", **LAMPE}},
        posenc.strategy("lampe", window=tiny.WINDOW, **LAMPE),
    ]
    with torch.no_grad():
        with posenc.apply(model, "lampe", **LAMPE) as handle:
            expected = model(ids).logits
            assert handle.describe()["strategy"] == {"name": "lampe", **LAMPE}
            assert handle.describe()["window"] == tiny.WINDOW
            assert "lampe" in repr(handle).lower()
        for form in forms:
            with posenc.apply(model, form) as handle:
                assert torch.equal(model(ids).logits, expected)
        assert handle.describe()["active"] is False


def test_layers_with_similar_tensors_choose_a_backend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, queries = tiny.make("llama"), []
    monkeypatch.setattr(CpuFlashBackend, "refuses", lambda _, q, *rest: queries.append(q.shape[2]))
    with posenc.apply(model, "lampe", **LAMPE), torch.no_grad():
        queries.clear()
        cache = model(tiny.tokens(1, 80)).past_key_values
        model(tiny.tokens(1, 1), past_key_values=cache)
        assert queries == [80, 1]
        monkeypatch.setenv("POSENC_TRACE", "1")  # traces every choice
        model(tiny.tokens(1, 1), past_key_values=cache)
        assert queries == [80, 1, 1, 1]
