"""The contract of an adapter, as a class for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from posenc.adapter import EVERY_FAMILY, ArchitectureAdapter
from posenc.errors import PluginError, PosencError
from posenc.hf.apply import apply
from posenc.hf.handle import Handle, attached
from posenc.plugins import adapter_info, adapters, strategy
from posenc.positions import IdentityStrategy
from posenc.testing.judge import dense_logits
from posenc.testing.models import decoded, difference, left_padded, model_outputs, relative_error, tokens
from posenc.testing.violation import violated

PADDING = 7


class AdapterContract:
    """Inherit from this in a test module and set :attr:`adapter` and :attr:`model`; every check is one test.

    All calls go through :func:`posenc.apply`. The adapter need not be registered, and no other adapter is used.

    Examples
    --------
    >>> class TestMine(posenc.testing.AdapterContract):
    ...     adapter = MyAdapter("mine", "my family", ("my_model_type",), style="half")
    ...     model = tiny_model
    ...     layers = ("2 x half, channels 0..15",)
    """

    adapter: ClassVar[ArchitectureAdapter]
    """The adapter; it need not be registered."""

    model: ClassVar[Callable[[], Any]]
    """A function that builds a tiny model of the family with random weights, in eval mode and the same every time.
    Give norms, biases and sinks other values than a fresh model has, so that a test fails if one is left out."""

    layers: ClassVar[Sequence[str]] = ()
    """What the probe must find, in the words of ``handle.layers()``; not compared if empty."""

    window: ClassVar[int | None] = None
    """The pretraining window of the model in tokens; if None, only its presence is checked."""

    prompt: ClassVar[int] = 40
    """Tokens of the prompt. The dense judge runs the whole text once per token."""

    new: ClassVar[int] = 5
    """Tokens decoded after the prompt."""

    tolerance: ClassVar[float] = 1e-3
    """Largest difference of a remap (float32) from the dense judge (float64), relative to the largest logit."""

    def test_it_can_be_registered(self) -> None:
        """It is an ArchitectureAdapter with a name and a summary, and its model types include the model's."""
        try:
            adapter_info(self.adapter, "the distribution under test")
        except PluginError as error:
            violated(str(error))
        served, model_type = self.adapter.model_types, self._built.config.model_type
        if not {model_type, EVERY_FAMILY} & set(served):
            violated(f"{self._name}: model_types are {', '.join(served)}, and the model is of type {model_type!r}.")

    def test_it_finds_the_parts(self) -> None:
        """The decoder is part of the model, the rotary modules are parts of the decoder, and there is a window."""
        model = self._built
        decoder = self.adapter.decoder(model)
        if not any(part is decoder for part in model.modules()):
            violated(f"{self._name}: decoder(model) returns {type(decoder).__name__}, which is no part of the model.")
        parts = dict(decoder.named_modules())
        for name, module in self.adapter.rotary_modules(decoder).items():
            if parts.get(name) is not module:
                violated(f"{self._name}: rotary_modules names {name!r}, which is no such module of the decoder.")
        window = self.adapter.window(model)
        if window < 1 or self.window not in (None, window):
            violated(f"{self._name}: window(model) is {window}, and should be {self.window or 'positive'}.")

    def test_the_probe_finds_what_is_declared(self) -> None:
        """``posenc.apply`` accepts the model, and every layer rotates as declared."""
        with self._applied("rope") as handle:
            layers = list(handle.layers())
        if self.layers and layers != list(self.layers):
            violated(f"{self._name}: the probe finds {layers}, but the contract declares {list(self.layers)}.")

    def test_identity(self) -> None:
        """With plain RoPE, the model's outputs are those of the unpatched model, within the declared tolerance."""
        stock = self._outputs()
        with self._applied("rope"):
            self._check_equal(stock, self._outputs(), "with the identity plan", self.adapter.tolerance)
        if self.adapter.tolerance > self.tolerance:
            violated(f"{self._name}: a tolerance of {self.adapter.tolerance:g} for the identity plan shows nothing.")

    def test_remap_equals_the_dense_judge(self) -> None:
        """A remap (ReRoPE with a window of six) equals the dense judge, in prefill and decoding."""
        model, ids = self._built, self._ids(1)
        with self._only_this_adapter():
            expected = self._judge_logits(ids, "rerope")
            with torch.no_grad():
                plain = model(ids, use_cache=False).logits[0]
            identity_error = relative_error(self._judge_logits(ids, "rope"), plain)
        if identity_error > self.tolerance:
            violated(
                f"{self._name}: the dense judge differs from the model itself by {identity_error:.2g}, so a "
                "comparison with it shows nothing. Does the model depend on positions outside of its attention?"
            )
        if relative_error(plain, expected) < 10 * self.tolerance:
            violated(f"{self._name}: a remap hardly changes the model's logits. Give it larger random weights.")
        with torch.no_grad(), self._applied("rerope"):
            outputs = {
                "prefill": model(ids, use_cache=False).logits[0],
                "decoding": decoded(model, ids, self.prompt)[0],
            }
        for what, logits in outputs.items():
            off = relative_error(logits, expected)
            if not off <= self.tolerance:
                row = int(((logits - expected).abs().amax(-1) > self.tolerance * expected.abs().max()).nonzero()[0])
                violated(
                    f"{self._name}: {what} under a remap differs from the dense judge from token {row} on, by "
                    f"{off:.2g} of the largest logit (allowed {self.tolerance:.0e})."
                )

    def test_padding_does_not_show(self) -> None:
        """Under a remap, a left-padded row has the same outputs as the row alone."""
        model, ids = self._built, self._ids(2)
        with torch.no_grad(), self._applied("rerope"):
            both = decoded(model, ids, self.prompt, left_padded(ids, PADDING))[0, PADDING:]
            alone = decoded(model, ids[:1, PADDING:], self.prompt - PADDING)[0]
        off = relative_error(both, alone)
        if not off <= self.tolerance:
            violated(f"{self._name}: a left-padded row differs from the row alone by {off:.2g} of the largest logit.")

    def test_detach_is_exact(self) -> None:
        """Afterwards, even after an error, the model is as before: outputs, weights, attention and hooks."""
        model = self._built
        stock, before = self._outputs(), _state(model)
        with pytest.raises(KeyError), self._applied("rerope"):
            raise KeyError("an error inside the block")
        with self._applied("rerope"):
            self._outputs()
        if attached(model) is not None:
            violated(f"{self._name}: the handle is still found after it was removed.")
        for name, value in _state(model).items():
            if not _same(before.get(name), value):
                violated(f"{self._name}: {name} is not what it was before posenc was applied.")
        self._check_equal(stock, self._outputs(), "after the handle was removed", 0.0)

    @property
    def _name(self) -> str:
        return f"adapter {self.adapter.name!r}"

    @property
    def _built(self) -> Any:
        # Through the class: a plain function would be bound to self.
        return _model(vars(self).get("model") or type(self).model)

    def _ids(self, batch: int) -> Tensor:
        return tokens(self._built.get_input_embeddings().num_embeddings, batch, self.prompt + self.new)

    def _outputs(self) -> dict[str, Tensor]:
        return model_outputs(self._built, self._ids(2), self.prompt, PADDING)

    def _strategy(self, name: str) -> Any:
        window = self.prompt + self.new
        if name == IdentityStrategy.name:
            return IdentityStrategy(window=window)
        return strategy(name, window=window, window_size=6, replan="never")

    def _judge_logits(self, ids: Tensor, name: str) -> Tensor:
        plan = self._strategy(name).plan(self.prompt, ids.shape[1])
        return dense_logits(self._built, ids, plan.relative_positions())

    @contextmanager
    def _applied(self, name: str) -> Iterator[Handle]:
        with self._only_this_adapter():
            try:
                handle = apply(self._built, self._strategy(name))
            except PosencError as error:
                violated(f"{self._name}: apply refuses the model ({type(error).__name__}): {error}")
            with handle:
                yield handle

    @contextmanager
    def _only_this_adapter(self) -> Iterator[None]:
        registry = adapters()
        before = dict(registry)
        registry.clear()
        registry[self.adapter.name] = adapter_info(self.adapter, "the distribution under test")
        try:
            yield
        finally:
            registry.clear()
            registry.update(before)

    def _check_equal(self, one: dict[str, Tensor], other: dict[str, Tensor], when: str, allowed: float) -> None:
        for what in one:
            off = difference(one[what], other[what])
            if off > allowed:
                bound = f"within {allowed:g}" if allowed else "bit-equal"
                violated(f"{self._name}: {what} {when} differs from stock by {off:.2g}, and must be {bound}.")


@cache
def _model(build: Callable[[], Any]) -> Any:
    """One model for all checks of a contract, each of which leaves it unchanged or fails."""
    return build()


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a handle could leave changed, by name."""
    state: dict[str, Any] = {name: value.detach().clone() for name, value in model.named_parameters()}
    state |= {name: value.detach().clone() for name, value in model.named_buffers()}
    for name, part in model.named_modules():
        state[f"the number of hooks on {name or 'the model'}"] = len(part._forward_hooks) + len(part._forward_pre_hooks)
        config: Any = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            state[f"the attention implementation of {name or 'the model'}"] = config._attn_implementation
    return state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
