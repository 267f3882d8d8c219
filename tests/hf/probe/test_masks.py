"""Masks of a forward are obeyed or refused under a remap, and left to the model under the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaModel,
)

import posenc
from posenc.hf.probe.masks import FAR, NotedMask
from posenc.hf.transformers_names import cache_argument
from tests.hf import tiny

LENGTH = 50
TRIANGLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
DISTANCE = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
SLIDING = TRIANGLE & (DISTANCE < 12)
ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(~TRIANGLE, float("-inf"))
REMAP: dict[str, Any] = {"window": 32, "group": 4, "window_size": 8}
TYPES = ["sliding_attention", "full_attention"]


def gemma3(**changes: Any) -> Any:
    torch.manual_seed(0)
    text = {**tiny.SHAPE, "sliding_window": 12, "layer_types": TYPES, **changes}
    return tiny_model(Gemma3TextConfig(**text))


def tiny_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tiny.tokens(1, LENGTH), **kwargs).logits
    return logits


def one_head(head: int) -> Tensor:
    mask = TRIANGLE.expand(1, 4, -1, -1).clone()
    mask[:, head, 30:, 5] = False
    return mask


def hole(mask: Tensor, key: int) -> Tensor:
    holed = mask.clone()
    holed[key + 2 :, key] = False
    return holed


def soft(blocked: float) -> Tensor:
    return torch.zeros_like(ADDED).masked_fill(~TRIANGLE, blocked)[None, None]


def by_type(full: Tensor, sliding: Tensor) -> dict[str, Tensor]:
    return {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a bias": ("llama", {"attention_mask": (ADDED.index_fill(1, torch.tensor(3), 2.0) + ADDED)[None, None]}, "adds"),
    "soft values": (
        "llama",
        {"attention_mask": torch.zeros_like(ADDED).masked_fill(~TRIANGLE, -1.0)[None, None]},
        "adds",
    ),
    "not a number": ("llama", {"attention_mask": ADDED.masked_fill(TRIANGLE, float("nan"))[None, None]}, "adds"),
    "head 2 of 4": ("llama", {"attention_mask": one_head(2)}, "every head"),
    "head 0 of 4": ("llama", {"attention_mask": one_head(0)}, "every head"),
    "a hidden key": ("llama", {"attention_mask": hole(TRIANGLE, 20)[None, None]}, "hides keys"),
    "everything": ("llama", {"attention_mask": torch.ones_like(TRIANGLE)[None, None]}, "later ones"),
    "a window of its own": ("llama", {"attention_mask": SLIDING[None, None]}, "hides keys"),
    "a dict whose second mask hides a key": (
        "gemma3",
        {
            "attention_mask": {
                "full_attention": TRIANGLE[None, None],
                "sliding_attention": hole(SLIDING, 28)[None, None],
            }
        },
        "hides keys",
    ),
    "a dict whose sliding layers see all": (
        "gemma3",
        {"attention_mask": by_type(TRIANGLE, TRIANGLE)},
        "sliding window",
    ),
    "a sliding mask for every layer": ("gemma3", {"attention_mask": SLIDING[None, None]}, "hides keys"),
    "both directions": ("llama", {"is_causal": False}, "both directions"),
}


def model_of(family: str) -> Any:
    return gemma3() if family == "gemma3" else tiny.make(family)


@pytest.mark.parametrize("case", list(CASES))
def test_a_remap_refuses_arguments_that_it_would_ignore(case: str) -> None:
    family, kwargs, reason = CASES[case]
    model = model_of(family)
    with (
        posenc.apply(model, "self_extend", **REMAP),
        pytest.raises((posenc.InvalidInputError, posenc.BackendError), match=reason),
    ):
        logits(model, **kwargs)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", ["rope", "yarn"])
def test_the_identity_obeys_the_arguments_like_the_model(case: str, name: str) -> None:
    family, kwargs, _ = CASES[case]
    model = model_of(family)
    expected = logits(model, **kwargs)
    with posenc.apply(model, name, window=4096, **({"factor": 1.0} if name == "yarn" else {})):
        got = logits(model, **kwargs)
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("blocked", [float("-inf"), torch.finfo(torch.float32).min, -65504.0, -1e9, -1e4])
def test_additive_masks_are_understood(blocked: float) -> None:
    model, added = tiny.make("llama"), soft(blocked)
    with posenc.apply(model, "self_extend", **REMAP):
        assert torch.equal(logits(model, attention_mask=added), logits(model))


def test_a_square_mask_of_one_row_applies_to_a_padded_batch() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(3, LENGTH)
    padded = TRIANGLE.clone()
    padded[:, :6] = False
    padding = torch.ones(3, LENGTH).long()
    padding[:, :6] = 0
    with torch.no_grad(), posenc.apply(model, "self_extend", **REMAP):
        got = model(ids, attention_mask=padded[None, None], position_ids=(padding.cumsum(1) - 1).clamp(min=0)).logits
        expected = model(ids, attention_mask=padding, position_ids=(padding.cumsum(1) - 1).clamp(min=0)).logits
    assert (got - expected)[:, 6:].abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 1, LENGTH, LENGTH), (1, 1, 3, LENGTH), (1, 1, LENGTH, 7)])
def test_square_masks_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny.make("llama")
    with (
        posenc.apply(model, "self_extend", **REMAP),
        pytest.raises(posenc.InvalidInputError, match="4-D attention_mask must be"),
    ):
        logits(model, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_attention_in_both_directions_is_refused() -> None:
    model = LlamaModel(tiny.make("llama").config).eval()
    with torch.no_grad(), posenc.apply(model, "self_extend", **REMAP):
        model.config.is_causal = False
        with pytest.raises(posenc.BackendError, match="both directions"):
            model(tiny.tokens(1, LENGTH))
    with pytest.raises(posenc.UnsupportedModelError, match="both directions"):
        posenc.apply(model, "self_extend", **REMAP)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": False}])
def test_the_identity_is_bit_equal_on_gemma2(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**tiny.SHAPE, sliding_window=12, query_pre_attn_scalar=16, layer_types=TYPES)
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    expected = logits(model, **kwargs)
    with posenc.apply(model, "rope"):
        assert torch.equal(logits(model, **kwargs), expected)


def with_image() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config={**vision, "image_size": 32, "patch_size": 8},
            text_config={**tiny.SHAPE, "sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": TYPES},
            mm_tokens_per_image=4,
            image_token_index=95,
            boi_token_index=93,
            eoi_token_index=94,
        )
    ).eval()
    ids = tiny.tokens(1, 40).clamp(max=90)
    ids[0, 5:9] = 95
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    types = (ids == 95).long()
    return model, {"input_ids": ids, "pixel_values": pixels, "token_type_ids": types}


def test_images_are_served_under_the_identity_and_refused_under_a_remap() -> None:
    model, inputs = with_image()
    with torch.no_grad():
        expected = model(**inputs).logits
        with posenc.apply(model, "rope"):
            assert torch.equal(model(**inputs).logits, expected)
        with posenc.apply(model, "rerope", window_size=8), pytest.raises(posenc.InvalidInputError, match="image"):
            model(**inputs)


def test_packed_sequences_are_served_under_the_identity_and_refused_under_a_remap() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 40)
    mask = torch.block_diag(torch.ones(15, 15), torch.ones(25, 25)).tril().bool()[None, None]
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        with posenc.apply(model, "rope"):
            assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, expected)
        with posenc.apply(model, "rerope", window_size=8), pytest.raises(posenc.InvalidInputError):
            model(ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("name", ["rope", "self_extend"])
def test_a_chunk_of_padding_in_every_row_changes_nothing(name: str) -> None:
    model, params = tiny.make("llama"), {} if name == "rope" else REMAP
    ids, mask = tiny.tokens(2, 48), torch.zeros(2, 48).long()
    mask[0, -30:], mask[1, -20:] = 1, 1
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with posenc.apply(model, name, **params) as handle, handle.prompt_length([30, 20]):
        whole = model.generate(ids, **settings)
    with posenc.apply(model, name, **params) as handle, handle.prompt_length([30, 20]):
        assert torch.equal(model.generate(ids, prefill_chunk_size=12, **settings), whole)


def test_a_decoded_padding_token_changes_nothing() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 60)
    with torch.no_grad(), posenc.apply(model, "self_extend", **REMAP):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            model(ids[:, :40], **cache_argument(model, cache))
        mask = torch.ones(1, 42).long()
        mask[0, 40] = 0
        model(ids[:, 40:41], attention_mask=mask[:, :41], **cache_argument(model, caches[1]))
        at = torch.tensor([[40]])
        expected = model(ids[:, 41:42], position_ids=at, **cache_argument(model, caches[0])).logits
        got = model(ids[:, 41:42], attention_mask=mask, position_ids=at, **cache_argument(model, caches[1])).logits
    assert (got - expected).abs().max() < 1e-4


def test_attention_weights_requested_in_the_configuration_are_refused_under_a_remap() -> None:
    model = tiny.make("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with posenc.apply(model, "rope"), torch.no_grad():
        assert len(model(tiny.tokens(1, LENGTH)).attentions) == 2
    with posenc.apply(model, "self_extend", **REMAP), pytest.raises(posenc.BackendError, match="output_attentions"):
        logits(model)


@pytest.mark.parametrize(
    ("sees", "reach"),
    [
        (lambda i, j: j <= i, FAR),
        (lambda i, j: (j <= i) & (j > i - 5), 5),
        (lambda i, j: (j <= i) & (j != i - 3), None),  # a hole
        (lambda i, j: j <= i + 1, None),  # the next token
        (lambda i, j: (j <= i) & (j >= i // 4 * 4), None),  # chunks: the width differs by query
        (lambda i, j: j < i, None),  # excludes the query itself
    ],
)
def test_the_reach_of_a_mask_is_read_from_its_function(sees: Callable[[Any, Any], Any], reach: int | None) -> None:
    assert NotedMask(torch.zeros(1), lambda _row, _head, i, j: sees(i, j)).reach == reach
