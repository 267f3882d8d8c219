"""A patched model works with the libraries around transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import posenc
from posenc.evaluate.models import tiny_folder
from tests.hf import tiny
from tests.hf.tiny import LAMPE


def test_a_pipeline_generates_with_the_strategy() -> None:
    model, tokenizer = (cls.from_pretrained(tiny_folder()) for cls in (AutoModelForCausalLM, AutoTokenizer))
    text = "the value of the expression is " * 60
    inputs = tokenizer(text, return_tensors="pt")
    with posenc.apply(model, "lampe", mapping=128, head=64):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0]
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        (out,) = generate(text, do_sample=False, max_new_tokens=8, return_full_text=False)
    assert out["generated_text"] == tokenizer.decode(expected[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("first", ["posenc", "peft"])
def test_lora_trains_under_a_remap(first: str) -> None:
    from peft import LoraConfig, get_peft_model

    ids = tiny.tokens(2, 70)
    torch.manual_seed(3)
    model = tiny.make("llama")
    if first == "posenc":
        handle = posenc.apply(model, "lampe", **LAMPE)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0))
    if first == "peft":
        handle = posenc.apply(adapted.get_base_model(), "lampe", **LAMPE)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapted.parameters() if p.requires_grad)
    assert losses[-1] < losses[0]
    handle.remove()
    assert posenc.attached(adapted.get_base_model()) is None


def test_gradients_of_lora_are_those_of_the_reference_backend() -> None:
    from peft import LoraConfig, get_peft_model

    ids, grads = tiny.tokens(2, 70), []
    for backend in ("cpu_flash", "reference"):
        torch.manual_seed(3)
        adapted = get_peft_model(
            tiny.make("llama"), LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
        )
        with posenc.apply(adapted.get_base_model(), "lampe", backend=backend, **LAMPE):
            adapted.eval()(input_ids=ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()


def test_device_map_hooks_change_nothing(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    with posenc.apply(model, "lampe", **LAMPE), torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path)
    spread = dispatch_model(
        spread,
        {
            "model.embed_tokens": "cpu",
            "model.layers": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        main_device="cpu",
        force_hooks=True,
    )
    with posenc.apply(spread, "lampe", **LAMPE), torch.no_grad():
        assert torch.equal(spread(ids).logits, expected)


def test_tensor_parallelism_over_two_processes_equals_one(tmp_path: Path) -> None:
    tiny.make("llama").save_pretrained(tmp_path)
    script = Path(__file__).with_name("tensor_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_forward_follows_apply_and_remove() -> None:
    torch._dynamo.reset()
    model, ids = tiny.make("llama"), tiny.tokens(1, 80)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, stock)
        for name, params in (("lampe", LAMPE), ("rerope", {"window_size": 8})):
            with posenc.apply(model, name, **params):
                eager = model(ids, use_cache=False).logits
                remapped = compiled(ids, use_cache=False).logits  # traced products and sums round differently
                assert (remapped - eager).abs().max() < 5e-5 < (remapped - stock).abs().max()
            assert torch.equal(compiled(ids, use_cache=False).logits, stock)


@pytest.mark.filterwarnings("ignore")
def test_compiled_forwards_are_exact_at_changing_lengths() -> None:
    # plans are made in Python, outside the graph: the graph must not contain anything of one length
    torch._dynamo.reset()
    model = tiny.make("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        for length in (80, 81, 100):
            ids = tiny.tokens(1, length)
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        for seed in range(4):
            one, other = (
                run(tiny.tokens(1, 1, seed=seed), past_key_values=cache).logits
                for run, cache in zip((compiled, model), caches, strict=True)
            )
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_gradients_through_a_compiled_forward_are_exact() -> None:
    torch._dynamo.reset()
    ids, grads = tiny.tokens(2, 70), []
    for compiles in (False, True):
        model = tiny.make("llama")
        with posenc.apply(model, "lampe", **LAMPE):
            run = torch.compile(model, backend="eager") if compiles else model
            run(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6 * grads[0].abs().max()
