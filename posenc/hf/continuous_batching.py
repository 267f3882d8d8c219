"""Continuous batching (``model.generate_batch``): many requests in one forward, each under its own plan.

transformers packs the new tokens of all requests into one row and keeps their keys in one paged cache, as raw keys. For
each request of a forward :class:`OpenBatches` makes a :class:`~posenc.hf.step.Step`, and :class:`PagedStep` runs them
all. A request knows its prompt, so a chunked prefill plans with the final length too, and its attention is the one that
``generate`` would give it.

transformers admits attention functions to continuous batching by name. A patched model therefore carries its own
``init_continuous_batching``, which shows the name ``sdpa`` while the manager is made.

Shape letters: H heads, L new tokens of all requests, K keys of all requests, D head_dim.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from posenc.adapter import LENGTH_DEPENDENT, rope_type
from posenc.errors import BackendError, CacheMismatchError, UnsupportedModelError
from posenc.hf.attachment import Attachment, Layers
from posenc.hf.cache.record import CacheRecord, Row
from posenc.hf.cache.state import CachedTokens
from posenc.hf.exclusive import exclusive
from posenc.hf.layer_call import LayerCall
from posenc.hf.step import Step
from posenc.hf.transformers_names import version
from posenc.planning.planner import KEPT_PLANS, Planner
from posenc.planning.schedule import Schedule
from posenc.positions import PositionStrategy

logger = logging.getLogger("posenc")

METHOD = "init_continuous_batching"
KEPT = "_cached_continuous_batching_manager"
"""Attribute of a model in which transformers keeps a manager for the next call."""

PAGED = ("cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table")
"""Keyword arguments of the forward that the paged cache reads, and writes to."""


class Request(NamedTuple):
    """One sequence of a forward: the length of its prompt, and its length before and after the forward, in tokens."""

    prompt: int
    before: int
    after: int


class OpenBatches:
    """The managers of continuous batching that a patched model has made; makes the steps of their forwards."""

    def __init__(self) -> None:
        self.managers: WeakSet[Any] = WeakSet()
        self.schedules: dict[int, tuple[int, Schedule]] = {}

    def __reduce__(self) -> tuple[type[OpenBatches], tuple[()]]:
        """Copies and pickles of a model start without managers."""
        return OpenBatches, ()

    def step(self, layers: Layers, kwargs: Mapping[str, Any], position_ids_1L: Tensor) -> PagedStep:
        """Make the step of one forward over packed requests.

        Parameters
        ----------
        layers : Layers
            What the attention layers of the forward share.
        kwargs : mapping
            Keyword arguments of the decoder's forward.
        position_ids_1L : int64 [1, L]
            Position ids of the packed tokens.

        Raises
        ------
        CacheMismatchError
            If the paged cache belongs to a manager that was made before the model was patched.
        """
        cache = kwargs["cache"]
        requests = [
            Request(entry.state._true_initial_tokens or len(entry.state.initial_tokens), length - new, length)
            for entry in self._processor(cache).inputs_and_outputs.requests_in_batch
            for new, length in [(entry.query_length, entry.state.position_offset)]
        ]
        ids_1K = torch.arange(max(request.after for request in requests), device=position_ids_1L.device)[None]
        steps = []
        for request in requests:
            row = Row(((0, request.after),), self._schedule(layers.attachment.planner, request))
            record = CacheRecord(layers.attachment.fingerprint, ids_1K[:, : request.after], (row,))
            steps.append(Step(CachedTokens(record, request.before, record), layers))
        return PagedStep(cache, {name: kwargs[name] for name in PAGED if name in kwargs}, requests, steps)

    def _processor(self, cache: Any) -> Any:
        for manager in self.managers:
            if manager.batch_processor is not None and manager.batch_processor.cache is cache:
                return manager.batch_processor
        raise CacheMismatchError(
            "this continuous batching manager was made before posenc was applied: its cache holds rotated keys. "
            "Make a new one (model.init_continuous_batching())."
        )

    def _schedule(self, planner: Planner, request: Request) -> Schedule:
        """Return the schedule that ``generate`` would have by now; it follows from the prompt and the length alone."""
        length, schedule = self.schedules.pop(request.prompt, (0, Schedule()))
        if not length:
            length, schedule = request.prompt, planner.extend(schedule, 0, request.prompt)
        if request.after > length:
            schedule = planner.extend(schedule, length, request.after, candidates=request.after - length)
            length = request.after
        while len(self.schedules) >= KEPT_PLANS:
            self.schedules.pop(next(iter(self.schedules)))
        self.schedules[request.prompt] = (length, schedule)
        return schedule


@dataclass(eq=False)
class InitContinuousBatching:
    """``init_continuous_batching`` of a patched model, set as an attribute of the model while it is patched.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    attachment : Attachment
        What its hooks share.
    """

    model: Any
    attachment: Attachment

    def __call__(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """Call transformers' own method, with settings under which every request is computed exactly.

        The parameters are those of transformers.

        Raises
        ------
        UnsupportedModelError
            If the model's frequencies follow the longest request, or this transformers hands the paged cache to
            attention in another way.
        CacheMismatchError
            If the model keeps a manager from before it was patched.
        BackendError
            If compiled or asynchronous batching was asked for.
        ModelBusyError
            If the model is running in another thread.
        """
        self._check()
        generation = generation_config or self.model.generation_config
        batching = continuous_batching_config or getattr(generation, "continuous_batching_config", None)
        decoder = self.attachment.adapter.decoder(self.model)
        with exclusive(self.model, decoder, "start continuous batching"), _shown_as_sdpa(self.model.config):
            manager = getattr(type(self.model), METHOD)(
                self.model,
                generation_config=generation_config,
                continuous_batching_config=exact_settings(batching, self.attachment.strategy),
                workload_hints=workload_hints,
            )
        _check_settings(manager.continuous_batching_config)
        self.attachment.batches.managers.add(manager)
        return manager

    def _check(self) -> None:
        from transformers.generation.continuous_batching import PagedAttentionCache

        model, attachment = self.model, self.attachment
        if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
            raise UnsupportedModelError(
                "continuous batching of a patched model needs the paged cache of transformers 5.23 or newer: "
                f"transformers {version()} hands it to attention in another way. Upgrade it, or call generate."
            )
        manager = getattr(model, KEPT, None)
        if manager is not None and manager not in attachment.batches.managers:
            raise CacheMismatchError(
                "the model keeps a continuous batching manager from before posenc was applied, with rotated keys. "
                "Call model.destroy_cached_continuous_batching_manager() first."
            )
        decoder: Any = attachment.adapter.decoder(model)
        sources = {facts.source for facts in attachment.facts.values() if facts.source is not None}
        for kind in (rope_type(decoder.get_submodule(source.module), source) for source in sources):
            if kind in LENGTH_DEPENDENT:
                raise UnsupportedModelError(
                    f"{type(model).__name__} chooses its own frequencies by the longest request of a batch ({kind}), "
                    "so a request would depend on its neighbours. Call generate."
                )


@dataclass
class PagedStep:
    """The step of a forward over packed requests, with one :class:`~posenc.hf.step.Step` for each of them.

    Parameters
    ----------
    cache : PagedAttentionCache
        Holds the keys and values of all requests.
    paging : dict
        Which slots of the cache the forward writes and reads.
    requests : list of Request
        The requests in packed order.
    steps : list of Step
        One per request.
    """

    cache: Any
    paging: dict[str, Any]
    requests: list[Request]
    steps: list[Step]
    _masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of one layer on raw packed queries and keys; output [1, L, H, D].

        Raises
        ------
        BackendError
            If the packed batch is padded.
        """
        module, q_1HLD, k_1HKD, v_1HKD = call.module, call.q_BHLD, call.k_BHKD, call.v_BHKD
        layer: int = module.layer_idx  # type: ignore[assignment]
        if "cache" in call.options:  # up to transformers 5.23 the attention function updates the cache
            k_1HKD, v_1HKD = self.cache.update(k_1HKD, v_1HKD, layer, dict(self.paging))
        allocator = self.cache.layer_to_allocator[layer]
        widths = [allocator.get_seqlen_k(before, after - before) for _, before, after in self.requests]
        new = [after - before for _, before, after in self.requests]
        if sum(widths) != k_1HKD.shape[2] or sum(new) != q_1HLD.shape[2]:
            raise BackendError(
                "the packed batch is padded, as for graph capture, and remapped attention needs one without padding. "
                "Leave use_cuda_graph and the compile settings of ContinuousBatchingConfig unset."
            )
        options = {name: value for name, value in call.options.items() if name not in ("cache", "is_causal", *PAGED)}
        parts = zip(
            self.steps,
            torch.split(q_1HLD, new, dim=2),
            torch.split(k_1HKD, widths, dim=2),
            torch.split(v_1HKD, widths, dim=2),
            strict=True,
        )
        outs = []
        for step, q, k, v in parts:
            facts = step.layers.facts.get(module)
            mask = self._mask(q, k, None if facts is None else facts.sliding_window)
            out, _ = step.attend(LayerCall(module, q, k, v, mask, call.scaling, call.dropout, options))
            outs.append(out)
        return torch.cat(outs, dim=1), None

    def _mask(self, q: Tensor, k: Tensor, sliding_window: int | None) -> Tensor | None:
        """Return the mask for the model's own attention, bool [1, 1, Lq, Lk], or None if causal attention is enough."""
        q_len, k_len = q.shape[2], k.shape[2]
        key = (q_len, k_len, sliding_window)
        if key not in self._masks:
            width = sliding_window or k_len
            key_index = torch.arange(k_len, device=q.device)
            distance = key_index[k_len - q_len :, None] - key_index
            allowed = (distance >= 0) & (distance < width)
            causal = q_len in (1, k_len) and k_len <= width
            self._masks[key] = None if causal else allowed[None, None]
        return self._masks[key]


def exact_settings(batching: Any, strategy: PositionStrategy) -> Any:
    """Return a copy of the batching settings, without those under which requests would depend on each other.

    Parameters
    ----------
    batching : ContinuousBatchingConfig or None
        The settings that the caller passed.
    strategy : PositionStrategy
        The strategy in force.
    """
    from transformers import ContinuousBatchingConfig

    settings = ContinuousBatchingConfig() if batching is None else copy.copy(batching)
    settings.auto_switch_to_flash = False
    if strategy.follows_prompt and settings.allow_block_sharing:
        logger.info(
            "block sharing is off: under %r the same tokens have other values in prompts of other lengths.",
            strategy.name,
        )
        settings.allow_block_sharing = False
    return settings


def _check_settings(resolved: Any) -> None:
    compiled = resolved.varlen_compile_config or resolved.decode_compile_config or any(resolved.cuda_graph_booleans)
    if compiled or resolved.use_async_batching:
        raise BackendError(
            "compiled, graph-captured and asynchronous continuous batching are not available while posenc is applied: "
            "plans follow lengths, which Python does not see in such batches. Leave use_cuda_graph, use_async_batching "
            "and the compile settings of ContinuousBatchingConfig unset."
        )


@contextmanager
def _shown_as_sdpa(config: Any) -> Iterator[None]:
    name = config._attn_implementation
    config._attn_implementation_internal = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation_internal = name


def install(model: Any, attachment: Attachment) -> None:
    """Give a model its own ``init_continuous_batching``, if transformers gives it one."""
    attachment.batches = OpenBatches()
    if hasattr(type(model), METHOD):
        setattr(model, METHOD, InitContinuousBatching(model, attachment))


def uninstall(model: Any) -> None:
    """Restore transformers' own ``init_continuous_batching``."""
    if isinstance(vars(model).get(METHOD), InitContinuousBatching):
        delattr(model, METHOD)


def stop(model: Any) -> None:
    """Stop the managers of a patched model: their caches hold raw keys, which the unpatched model cannot use."""
    init = vars(model).get(METHOD)
    if not isinstance(init, InitContinuousBatching):
        return
    for manager in list(init.attachment.batches.managers):
        if manager.is_running():
            logger.warning("posenc is removed while continuous batching runs: its open requests fail.")
            manager.stop(hard_stop=True)
        if getattr(model, KEPT, None) is manager:
            model.destroy_cached_continuous_batching_manager()
