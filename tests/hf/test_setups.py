"""A patched model works wherever the unpatched one does: mixed precision, offloaded weights, wrappers, tracing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import posenc
from posenc.adapter import ArchitectureAdapter, RotarySource
from posenc.hf.transformers_names import cache_argument
from posenc.rope import Rotary
from tests.hf import tiny

LENGTH = 60
REMAP: dict[str, Any] = {"window": 32, "group": 4, "window_size": 8}
DEEPSEEK: dict[str, Any] = {
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**tiny.SHAPE)).eval()
    if name == "deepseek_v3":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**{**tiny.SHAPE, **DEEPSEEK})).eval()
    return tiny.make(name)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tiny.tokens(2, LENGTH) if ids is None else ids).logits
    return logits


FAMILIES = pytest.mark.parametrize("name", ["llama", "qwen3", "cohere", "deepseek_v3"])


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_identity_is_bit_equal_in_mixed_precision(name: str, dtype: torch.dtype) -> None:
    model = family(name)
    with torch.autocast("cpu", dtype=dtype):
        expected = logits(model)
        with posenc.apply(model, "rope"):
            assert torch.equal(logits(model), expected)


@FAMILIES
def test_a_remap_is_close_in_mixed_precision(name: str) -> None:
    """It may differ from full precision about as much as the unpatched model does."""
    model = family(name)
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        allowed = 3 * float((logits(model).float() - exact).abs().max())
    with posenc.apply(model, "self_extend", **REMAP):
        expected = logits(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = logits(model).float()
    assert 0 < (got - expected).abs().max() < allowed
    assert (expected - exact).abs().max() > 2 * allowed or allowed > 0.5


@pytest.mark.parametrize("name", ["rope", "self_extend"])
def test_a_trainer_runs_in_mixed_precision(name: str, tmp_path: Path) -> None:
    def trained(strategy: str | None) -> float:
        model = tiny.make("llama")
        if strategy is not None:
            posenc.apply(model, strategy, **({} if strategy == "rope" else REMAP))
        rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(4, 80).tolist()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            bf16=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        loss: float = trainer.train().training_loss
        return loss

    plain, patched = trained(None), trained(name)
    assert abs(patched - plain) < (1e-3 if name == "rope" else 0.2) * plain
    assert name == "rope" or patched != plain


def test_a_default_dtype_of_bfloat16_is_supported() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny.make("llama")
        assert model.dtype == torch.bfloat16
        expected = logits(model)
        with posenc.apply(model, "rope"):
            assert torch.equal(logits(model), expected)
        with posenc.apply(model, "self_extend", **REMAP):
            assert logits(model).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_works_after_inference_mode() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, LENGTH)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with posenc.apply(model, "self_extend", **REMAP):
        expected = gradients()
    with posenc.apply(model, "self_extend", **REMAP):
        with torch.inference_mode():
            model(ids)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("scaling", [None, "dynamic"])
def test_offloaded_weights_change_nothing(order: str, buffers: bool, scaling: str | None) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        changes = {} if scaling is None else {"rope_scaling": {"rope_type": scaling, "factor": 2.0}}
        return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, **changes)).eval()

    model = make()
    plain = logits(model)
    with posenc.apply(model, "self_extend", **REMAP):
        expected = logits(model)
    model = make()
    if order == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    with posenc.apply(model, "self_extend", **REMAP):
        if order == "after":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), plain)


def test_a_peft_model_equals_its_merged_base() -> None:
    base = tiny.make("llama")
    model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    with posenc.apply(merged, "self_extend", **REMAP):
        expected = logits(merged)
    with posenc.apply(model, "self_extend", **REMAP):
        assert posenc.attached(model) is not None
        assert (logits(model) - expected).abs().max() < 1e-4
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(("wrap", "fix"), [(torch.compile, "_orig_mod"), (nn.DataParallel, ".module")])
def test_wrapped_models_are_refused_with_a_fix(wrap: Any, fix: str) -> None:
    with pytest.raises(posenc.UnsupportedModelError, match=fix):
        posenc.apply(wrap(tiny.make("llama")), "rope")


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize("name", ["rope", "self_extend"])
def test_tracing_and_export_are_refused_in_words(name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, LENGTH)
    with posenc.apply(model, name, **({} if name == "rope" else REMAP)), torch.no_grad():
        with pytest.raises(posenc.UnsupportedModelError, match=r"torch\.jit\.trace"):
            torch.jit.trace(Logits(model), (ids,), check_trace=False)
        with pytest.raises(posenc.UnsupportedModelError, match=r"torch\.export"):
            torch.export.export(Logits(model), (ids,), strict=False)
        assert logits(model).isfinite().all()


def test_outputs_may_be_tuples() -> None:
    """In transformers 5.24 a model with a head does not run with this setting; its decoder does."""
    torch.manual_seed(0)
    model, ids = LlamaModel(LlamaConfig(**tiny.SHAPE)).eval(), tiny.tokens(1, LENGTH)
    with torch.no_grad():
        with posenc.apply(model, "self_extend", **REMAP):
            cache = model(ids[:, :40])[1]
            expected = model(ids[:, 40:41], **cache_argument(model, cache))[0]
        model.config.return_dict = False
        with posenc.apply(model, "self_extend", **REMAP):
            output = model(ids[:, :40])
            assert isinstance(output, tuple)
            assert torch.equal(model(ids[:, 40:41], **cache_argument(model, output[1]))[0], expected)


def test_models_of_one_configuration_do_not_disturb_each_other() -> None:
    config = LlamaConfig(**tiny.SHAPE)
    config._attn_implementation = "eager"
    patched, other, third = (LlamaForCausalLM(config).eval() for _ in range(3))
    ids = tiny.tokens(1, 20)
    with torch.no_grad():
        plain = [model(ids, output_attentions=True) for model in (patched, other, third)]
        handle = posenc.apply(patched, "self_extend", **REMAP)
        second = posenc.apply(third, "rope")
        for model, expected in ((other, plain[1]), (third, plain[2])):
            got = model(ids, output_attentions=True)
            assert torch.equal(got.logits, expected.logits)
            assert len(got.attentions) == 2
        handle.remove()
        assert torch.equal(third(ids).logits, plain[2].logits)
        second.remove()
        for model, expected in zip((patched, other, third), plain, strict=True):
            got = model(ids, output_attentions=True)
            assert torch.equal(got.logits, expected.logits)
            assert all(torch.equal(a, b) for a, b in zip(got.attentions, expected.attentions, strict=True))


class Halved(ArchitectureAdapter):
    """Gets the frequencies by running the model's own module, for models that store them in no attribute."""

    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        module: Any = decoder.get_submodule(source.module)
        cos, sin = module(torch.empty(0), torch.ones(1, 1, dtype=torch.long))
        half = cos.shape[-1] // 2
        return Rotary(torch.atan2(sin[0, 0, :half], cos[0, 0, :half]))


def test_an_adapter_may_read_frequencies_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    with posenc.apply(model, "self_extend", **REMAP):
        expected = logits(model)
    adapter = Halved("own", "reads tables", ("llama",), tolerance=1e-4)
    monkeypatch.setattr("posenc.hf.apply.find_adapter", lambda model: adapter)
    with posenc.apply(model, "self_extend", **REMAP):
        assert (logits(model) - expected).abs().max() < 1e-3
        module: Any = model.model.rotary_emb
        del module.inv_freq  # only the adapter reads it, through the module, which now fails
        with pytest.raises(AttributeError):
            logits(model)


def test_a_decoder_that_drops_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a renaming in transformers: the cache is ignored, and every token is treated as a prompt of its own."""
    model = tiny.make("llama")
    monkeypatch.setattr("posenc.hf.probe.selftest.cache_argument", lambda module, cache: {"renamed_cache": cache})
    before = logits(model)
    with pytest.raises(posenc.UnsupportedModelError, match=r"decode on the cache.*transformers 5\."):
        posenc.apply(model, "rope")
    assert posenc.attached(model) is None
    assert torch.equal(logits(model), before)


class Renamed(LlamaModel):
    """A decoder of a future version of transformers."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, kv: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **cache_argument(LlamaModel(self.config), kv), **kwargs)


def test_a_renamed_cache_is_refused() -> None:
    with pytest.raises(posenc.UnsupportedModelError, match=r"no name that posenc knows.*transformers 5\."):
        posenc.apply(Renamed(LlamaConfig(**tiny.SHAPE)).eval(), "rope")


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_weights_sharded_after_apply_change_nothing() -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny.make("llama")
    plain = logits(model)
    with posenc.apply(model, "self_extend", **REMAP):
        expected = logits(model)
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), plain)
    with pytest.raises(posenc.UnsupportedModelError, match="Apply posenc first, then shard"):
        posenc.apply(model, "self_extend", **REMAP)
