"""Applying and removing while the model runs in another thread is refused, and does not disturb that thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import posenc
from posenc.hf.exclusive import Gate
from tests.hf import tiny
from tests.hf.threads import PATIENCE
from tests.hf.tiny import LAMPE


class Pause:
    """Called inside another thread's forward: signals that it was reached, and waits for permission to continue."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(PATIENCE)


@contextmanager
def paused(pause: Pause, work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Keep another thread inside ``work`` while the block runs; its result, or its error, is appended to the list."""
    results: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            try:
                results.append(work())
            except posenc.PosencError as error:
                results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert pause.reached.wait(PATIENCE)
    try:
        yield results
    finally:
        pause.go.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def setup() -> tuple[Any, torch.Tensor, Pause]:
    model, pause = tiny.make("llama"), Pause()
    model.model.layers[0].register_forward_hook(lambda *_: pause())
    return model, tiny.tokens(1, 80), pause


def test_a_running_stock_forward_refuses_apply() -> None:
    model, ids, pause = setup()
    with torch.no_grad():
        stock = model(ids).logits
        with paused(pause, lambda: model(ids).logits) as results:
            for target in (model, model.model):
                with pytest.raises(posenc.ModelBusyError, match=r"cannot apply a strategy.*Nothing was changed"):
                    posenc.apply(target, "lampe", **LAMPE)
            assert posenc.attached(model) is None
            assert model.config._attn_implementation == "sdpa"
            with posenc.apply(tiny.make("llama"), "lampe", **LAMPE):  # other models are unaffected
                pass
        assert torch.equal(results[0], stock)
        with posenc.apply(model, "lampe", **LAMPE):
            assert not torch.equal(model(ids).logits, stock)


def test_a_running_patched_forward_refuses_remove() -> None:
    model, ids, pause = setup()
    handle = posenc.apply(model, "lampe", **LAMPE)
    with torch.no_grad():
        patched = model(ids).logits
        with paused(pause, lambda: model(ids).logits) as results:
            with pytest.raises(posenc.ModelBusyError, match="cannot remove the strategy"):
                handle.remove()
            assert handle.is_active
        assert torch.equal(results[0], patched)
        assert torch.equal(model(ids).logits, patched)
    handle.remove()
    assert not handle.is_active


def test_generate_counts_as_running_between_its_forwards() -> None:
    model, ids, pause = tiny.make("llama"), tiny.tokens(1, 80), Pause()

    def between(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pause()
        return scores

    def generate() -> torch.Tensor:
        out: torch.Tensor = model.generate(
            ids, do_sample=False, max_new_tokens=5, logits_processor=LogitsProcessorList([between])
        )
        return out

    stock = model.generate(ids, do_sample=False, max_new_tokens=5)
    for target in (model, model.model):
        pause = Pause()
        with paused(pause, generate) as results, pytest.raises(posenc.ModelBusyError):
            posenc.apply(target, "lampe", **LAMPE)
        assert torch.equal(results[0], stock)


def test_a_forward_that_starts_during_apply_is_refused() -> None:
    model, ids, pause = setup()
    with torch.no_grad():
        stock = model(ids).logits
        with paused(pause, lambda: posenc.apply(model, "lampe", **LAMPE)) as results:
            with pytest.raises(posenc.ModelBusyError, match="run the model again"):
                model(ids)
            with pytest.raises(posenc.ModelBusyError, match="changed elsewhere"):
                posenc.apply(model, "rerope")
        (handle,) = results
        assert not torch.equal(model(ids).logits, stock)
        handle.remove()
        assert torch.equal(model(ids).logits, stock)
    assert not any(isinstance(hook, Gate) for hook in model.model._forward_pre_hooks.values())


def test_a_callback_inside_a_forward_may_not_change_the_model() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 20)
    hook = model.model.layers[0].register_forward_hook(lambda *_: posenc.apply(model, "lampe", **LAMPE))
    with torch.no_grad(), pytest.raises(posenc.ModelBusyError):
        model(ids)
    hook.remove()
    assert posenc.attached(model) is None


def test_two_threads_generate_on_one_patched_model() -> None:
    model, pause = tiny.make("llama"), Pause()
    prompts = [tiny.tokens(1, 80, seed=seed) for seed in (1, 2)]
    with posenc.apply(model, "lampe", **LAMPE), torch.no_grad():
        expected = [model.generate(ids, do_sample=False, max_new_tokens=6) for ids in prompts]
        hook = model.model.layers[0].register_forward_hook(lambda *_: pause())
        with paused(pause, lambda: model.generate(prompts[0], do_sample=False, max_new_tokens=6)) as results:
            assert torch.equal(model.generate(prompts[1], do_sample=False, max_new_tokens=6), expected[1])
        assert torch.equal(results[0], expected[0])
        hook.remove()
