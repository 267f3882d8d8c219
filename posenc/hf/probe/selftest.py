"""Compare the patched model with the unpatched one, as the last step before ``posenc.apply`` returns.

The probe has measured the layers (``posenc/hf/probe/probe.py``). Here each layer's own attention function must equal
the softmax that plans compute, and with the identity plan the decoder's output must equal that of the unpatched model.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posenc.adapter import ArchitectureAdapter
from posenc.errors import UnsupportedModelError
from posenc.hf.layer_call import LayerCall
from posenc.hf.probe.probe import as_measured, execution_device, name_of
from posenc.hf.stock import stock_attention
from posenc.hf.transformers_names import cache_argument, output_cache, version
from posenc.kernels.dispatch import attention
from posenc.plan import PositionPlan
from posenc.positions import IdentityStrategy
from posenc.rope import Rotary

TOKENS = 12
LOUD = 3.0
"""Standard deviation of the queries and keys that test attention functions; large, so that a softcap shows."""


def forward_of_fixed_tokens(decoder: Any) -> Tensor:
    """Run a prompt of a few fixed tokens and decode one more on its cache; return the hidden states [1, L, hidden].

    Raises
    ------
    UnsupportedModelError
        If the decoder does not run on tokens alone, or does not return its cache and decode on it.
    """
    embeddings = decoder.get_input_embeddings()
    device = execution_device(embeddings)
    tokens_1L = (torch.arange(TOKENS, device=device) * 7919 % embeddings.num_embeddings)[None]
    ids_1L = torch.arange(TOKENS, device=device)[None]  # as generate does: some families else count from 0 every time
    options: dict[str, Any] = {"use_cache": True, "return_dict": True}
    try:
        with as_measured(decoder, device):
            prompt = decoder(input_ids=tokens_1L[:, :-1], position_ids=ids_1L[:, :-1], **options)
            cache = output_cache(prompt)
            if cache is None:
                raise UnsupportedModelError(
                    f"{type(decoder).__name__} ({decoder.config.model_type!r}) returns no KV cache that posenc knows "
                    f"(transformers {version()})."
                )
            options |= cache_argument(decoder, cache)
            decoded = decoder(input_ids=tokens_1L[:, -1:], position_ids=ids_1L[:, -1:], **options)
            count = int(cache.get_seq_length())
            if count != TOKENS:
                raise UnsupportedModelError(
                    f"{type(decoder).__name__} ({decoder.config.model_type!r}) does not decode on the cache it is "
                    f"handed: it counts {count} tokens there after {TOKENS}, so posenc could not follow it "
                    f"(transformers {version()})."
                )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} ({decoder.config.model_type!r}) does not run on a few tokens alone: {error}"
        ) from error
    return torch.cat((prompt[0], decoded[0]), dim=1)


def check_identity(decoder: Any, expected: Tensor, adapter: ArchitectureAdapter) -> None:
    """Check that with the identity plan a patched decoder equals the unpatched one.

    Parameters
    ----------
    decoder : Module
        The patched decoder.
    expected : Tensor [1, L, hidden]
        What :func:`forward_of_fixed_tokens` returned on the unpatched decoder.
    adapter : ArchitectureAdapter
        Its ``tolerance`` is the largest difference allowed; 0 means equal to the last bit.

    Raises
    ------
    UnsupportedModelError
        If they differ.
    """
    actual = forward_of_fixed_tokens(decoder)
    if torch.equal(expected, actual):
        return
    worst_L = (expected - actual).abs().flatten(2).amax((0, 2))
    if not float(worst_L.max()) <= adapter.tolerance:
        where = f"{type(decoder).__name__} ({decoder.config.model_type!r})"
        if float(worst_L[:-1].max()) <= adapter.tolerance:
            raise UnsupportedModelError(
                f"{where} does not decode as it does unpatched: with the identity plan the token after the prompt "
                f"differs by {float(worst_L[-1]):.3g}. It passes its cache on in a way that posenc does not know "
                f"(transformers {version()})."
            )
        raise UnsupportedModelError(
            f"{where} does not compute plain attention on rotated queries and keys: with the identity plan its output "
            f"differs by {float(worst_L.max()):.3g} (transformers {version()})."
        )


def check_attention(decoder: nn.Module, calls: list[LayerCall], implementation: str) -> None:
    """Check that every layer's own attention function is the softmax (with softcap and sinks) that plans compute.

    Parameters
    ----------
    decoder : Module
        The decoder.
    calls : list of LayerCall
        The calls that the probe recorded.
    implementation : str
        The attention implementation that the model was loaded with.

    Raises
    ------
    UnsupportedModelError
        If one of them computes something else.
    """
    plan = IdentityStrategy().plan(TOKENS)
    generator = torch.Generator().manual_seed(0)
    for call in calls:
        where = f"{type(decoder).__name__}, layer {name_of(decoder, call.module)}"
        q, k, v = (
            torch.randn(1, x.shape[1], TOKENS, x.shape[3], generator=generator, dtype=torch.float32).to(x.device)
            * scale
            for x, scale in ((call.q_BHLD, LOUD), (call.k_BHKD, LOUD), (call.v_BHKD, 1.0))
        )
        expected = _stock(call, (q, k, v), implementation, where)
        actual = _plain(call, q, k, v, plan)
        if expected.shape != actual.shape or not torch.allclose(expected, actual, atol=1e-4, rtol=1e-4):
            raise UnsupportedModelError(
                f"{where}: its {implementation} attention is not a softmax over queries, keys, softcap and sinks as "
                f"handed to transformers' AttentionInterface (options: {', '.join(_option_names(call)) or 'none'})."
            )


def _stock(call: LayerCall, qkv: tuple[Tensor, Tensor, Tensor], implementation: str, where: str) -> Tensor:
    """Run a layer's own attention function on other tensors."""
    try:
        with as_measured(call.module, qkv[0].device):
            out: Tensor = stock_attention(implementation, call.module)(
                call.module, *qkv, None, dropout=0.0, scaling=call.scaling, **call.options
            )[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        hint = " Load the model with attn_implementation='eager'." if implementation != "eager" else ""
        raise UnsupportedModelError(f"{where}: its {implementation} attention does not run: {error}{hint}") from error
    return out.float()


def _plain(call: LayerCall, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, plan: PositionPlan) -> Tensor:
    """Run posenc's attention on the same tensors, without rotating them."""
    no_rotation = Rotary(torch.zeros(1, dtype=torch.float32))
    with as_measured(call.module, q_BHLD.device):
        out = attention(
            q_BHLD,
            k_BHLD,
            v_BHLD,
            plan,
            no_rotation,
            scale=call.scaling,
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux"),
        )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _option_names(call: LayerCall) -> list[str]:
    return [name for name, value in call.options.items() if value is not None]
