"""posenc.attention under torch.autocast casts its inputs like torch's own attention, and is exact otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import posenc
from tests.hf import tiny

PLAN = posenc.strategy("self_extend", window=32, group=4, window_size=8).plan(40)
ROTARY = posenc.Rotary.from_theta(1e4, 16)
MIXTURES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.bfloat16),
)


def qkv(*dtypes: torch.dtype, q_len: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, q_len), (2, 40), (2, 40))
    return [torch.randn(1, h, n, 16, generator=generator).to(own) for (h, n), own in zip(sizes, dtypes, strict=True)]


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inputs_are_cast_like_those_of_torch(dtypes: tuple[torch.dtype, ...], into: torch.dtype, backend: str) -> None:
    for q_len in (40, 1):
        given = qkv(*dtypes, q_len=q_len)
        options: dict[str, Any] = {"backend": backend, "return_lse": True, "sinks": torch.linspace(-1, 1, 4)}
        with torch.autocast("cpu", into):
            stock = F.scaled_dot_product_attention(*given, enable_gqa=True)
            found = posenc.attention(*given, PLAN, ROTARY, **options)
        expected = posenc.attention(*(x.to(into) for x in given), PLAN, ROTARY, **options)
        assert found[0].dtype == stock.dtype == into
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    if len(set(dtypes)) > 1:
        with pytest.raises(posenc.InvalidInputError, match="one floating dtype"):
            posenc.attention(*given, PLAN, ROTARY)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float64_is_not_cast(backend: str) -> None:
    given = qkv(*[torch.float64] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*given, enable_gqa=True).dtype == torch.float64
        found = posenc.attention(*given, PLAN, ROTARY, backend=backend)
    assert torch.equal(found, posenc.attention(*given, PLAN, ROTARY, backend=backend))


def test_autocast_is_off_inside_a_backend() -> None:
    """A third party's backend may multiply half-precision inputs in float32."""
    from posenc.kernels.reference import ReferenceBackend
    from posenc.testing.tensors import installed

    class Own(ReferenceBackend):
        name = "own"

        def attend(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert not torch.is_autocast_enabled("cpu")
            return super().attend(*args, **options)

    with installed(Own()) as name, torch.autocast("cpu", torch.bfloat16):
        posenc.attention(*qkv(*[torch.float32] * 3), PLAN, ROTARY, backend=name)
        posenc.attention(*qkv(*[torch.float32] * 3), [PLAN], ROTARY, backend=name)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_cast_tensors(backend: str) -> None:
    gradients = []
    for autocast in (True, False):
        leaves = [x.requires_grad_() for x in qkv(torch.float32, torch.float32, torch.bfloat16)]
        given = leaves if autocast else [x.to(torch.bfloat16) for x in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = posenc.attention(*given, PLAN, ROTARY, backend=backend)
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
        assert [x.dtype for x in gradients[-1]] == [x.dtype for x in leaves]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def deepseek() -> Any:
    """Return a model with multi-head latent attention: float32 queries, bfloat16 keys and values reach attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = DeepseekV3Config(
        vocab_size=61, max_position_embeddings=64, pad_token_id=0, first_k_dense_replace=2,
        **sizes, **heads, **widths, **experts,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek"])
@pytest.mark.parametrize("cache", ["rotated", "raw"])
def test_a_remapped_model_decodes_and_trains(family: str, cache: Any) -> None:
    """The layers' own mixture of dtypes reaches the attention function."""
    model, ids = deepseek() if family == "deepseek" else tiny.make(family), tiny.tokens(1, 50) % 61
    with posenc.apply(model, "self_extend", cache=cache, window=32, group=4, window_size=8):
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
            with torch.no_grad():
                whole = model(ids).logits
                past = model(ids[:, :40]).past_key_values
                steps = [model(ids[:, at : at + 1], past_key_values=past).logits for at in range(40, 50)]
        loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    scale = float(exact.detach().abs().max())
    assert (whole - exact).abs().max() < 0.05 * scale
    assert (torch.cat(steps, 1)[:, -1] - whole[:, -1]).abs().max() < 0.05 * scale
