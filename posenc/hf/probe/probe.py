"""Measure what a model's attention layers do, when a strategy is applied, instead of trusting the family's name.

One forward of one-token rows runs through the decoder. Every token appears in one row per case, and the rotary modules
give each case another rotation: none, a quarter turn, none with doubled cosines, or the model's own. The attention
function returns the values unchanged. So all rows of a token reach every layer with the same hidden states, and the
rotation is the only difference between their queries and keys.

``posenc.apply`` runs :func:`probe` before it installs the hooks. ``layer_facts.py`` reads the recorded calls,
``masks.py`` measures the sliding windows, and ``selftest.py`` compares outputs.

Shape letters: R rows (cases x tokens), H heads, L tokens of a row, D head_dim.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posenc.adapter import ArchitectureAdapter, LayerFacts, RotarySource
from posenc.errors import UnsupportedModelError
from posenc.hf.layer_call import LayerCall
from posenc.hf.probe.layer_facts import CASES, POSITION, TOKENS, Kinds, alike, layer_facts
from posenc.hf.probe.masks import NotedMask, noted_masks
from posenc.hf.step_forwarding import install_step_forwarding
from posenc.hf.transformers_names import CACHE_NAMES, returns_cache, version
from posenc.hf.unstepped import unstepped_modules
from posenc.rope import Arithmetic

Facts = dict[nn.Module, LayerFacts]

ARITHMETICS: tuple[Arithmetic, ...] = ("native", "mixed", "float32")


@dataclass
class Recorder:
    """Takes the place of a Step: records the calls of the attention function in ``calls``, and returns the values."""

    calls: list[LayerCall] = field(default_factory=list)

    def attend(self, call: LayerCall) -> tuple[Tensor, None]:
        """Record a call, and return the values of its only key for every query head."""
        self.calls.append(call)
        q_RHLD, v_RHLD = call.q_BHLD, call.v_BHKD
        groups = q_RHLD.shape[1] // v_RHLD.shape[1]
        return v_RHLD[:, :, -q_RHLD.shape[2] :].repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


@dataclass
class CaseHook:
    """Replaces the tables of a rotary module by those of each row's case.

    Parameters
    ----------
    name : str
        Name of the module inside the decoder.
    tables : dict
        Receives the module's own output, by the source of frequencies.
    """

    name: str
    tables: dict[RotarySource, Any]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 and isinstance(args[2], str) else None)
        self.tables[RotarySource(self.name, layer_type)] = output
        if isinstance(output, Tensor) and output.is_complex():
            return _with_cases(output, (1, 1j, 2))
        if isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output):
            return _with_cases(output[0], (1, 0, 2)), _with_cases(output[1], (0, 1, 0))
        raise UnsupportedModelError(
            f"{type(module).__name__} returns neither (cos, sin) nor one complex tensor: its rotation is out of reach."
        )


def _with_cases(table: Tensor, values: tuple[Any, ...]) -> Tensor:
    """Return the table with the rows of the first cases set to a constant each."""
    rows = TOKENS * len(CASES)
    if table.ndim != 3 or table.shape[0] not in (1, rows):
        raise UnsupportedModelError(
            f"a rotary module returns a table of shape {tuple(table.shape)} instead of [batch, tokens, channels]."
        )
    by_row = table.expand(rows, *table.shape[1:]).clone()
    for case, value in enumerate(values):
        by_row[case * TOKENS : (case + 1) * TOKENS] = value
    return by_row


@dataclass(frozen=True)
class Findings:
    """What the probe measured.

    Parameters
    ----------
    calls : list of LayerCall
        Every call of the attention function, with its options.
    facts : dict of LayerFacts
        What each attention module rotates and sees.
    rotaries : tuple of str
        Names of the rotary modules that the decoder calls.
    """

    calls: list[LayerCall]
    facts: Facts
    rotaries: tuple[str, ...]


def probe(model: nn.Module, decoder: Any, adapter: ArchitectureAdapter, step_name: str) -> Findings:
    """Measure every attention layer of a model that already runs posenc's attention function.

    Parameters
    ----------
    model, decoder : Module
        The model and its decoder.
    adapter : ArchitectureAdapter
        Says where the family keeps its parts.
    step_name : str
        Name of the keyword argument that holds the step.

    Raises
    ------
    UnsupportedModelError
        If any layer cannot be served exactly; the message gives the reason.
    """
    rotaries = adapter.rotary_modules(decoder)
    tables: dict[RotarySource, Any] = {}
    handles = [
        module.register_forward_hook(CaseHook(name, tables), with_kwargs=True) for name, module in rotaries.items()
    ]
    try:
        with unstepped_modules() as unstepped:
            run = _run(decoder, step_name)
        if unstepped:
            modules = set(decoder.modules())
            install_step_forwarding(
                decoder, [module for module in dict.fromkeys(unstepped) if module in modules], step_name
            )
            tables.clear()
            with unstepped_modules() as unreached:
                run = _run(decoder, step_name)
            _check_unreached(decoder, unreached)
    finally:
        for handle in handles:
            handle.remove()
    _check_calls(decoder, run, tables)
    position_ids = torch.full((1, 1), POSITION, device=run.output.device)
    bases = {source: adapter.rotary(decoder, source, position_ids) for source in tables}
    roundings: dict[RotarySource, tuple[Arithmetic, ...]]
    roundings = {source: ("complex",) if isinstance(table, Tensor) else ARITHMETICS for source, table in tables.items()}
    facts: Facts = {}
    for call in run.calls:
        name = name_of(decoder, call.module)
        likely = sorted(bases, key=lambda source: _unlikely(source, decoder, call.module, name))
        kinds: Kinds = {source: (bases[source], roundings[source]) for source in likely}
        measured = layer_facts(call, kinds, run.masks, f"{_named(decoder)}, layer {name}")
        if facts.setdefault(call.module, measured) != measured:
            raise UnsupportedModelError(f"{_named(decoder)}, layer {name}: attends in different ways in one forward.")
    _check_declaration(adapter, decoder, facts)
    return Findings(run.calls, facts, tuple(dict.fromkeys(source.module for source in tables)))


@dataclass
class ProbeRun:
    """One forward of the probe's rows: its attention calls, the masks it made, and its hidden states [R, 1, hidden]."""

    calls: list[LayerCall]
    masks: list[NotedMask]
    output: Tensor


def _run(decoder: Any, step_name: str) -> ProbeRun:
    recorder = Recorder()
    embeddings = decoder.get_input_embeddings()
    device = execution_device(embeddings)
    tokens = (torch.arange(TOKENS, device=device) * 7919 + 11) % embeddings.num_embeddings
    tokens_RL = tokens.repeat(len(CASES))[:, None]
    try:
        with as_measured(decoder, device), noted_masks() as masks:
            output = decoder(
                input_ids=tokens_RL,
                attention_mask=torch.ones_like(tokens_RL),
                position_ids=torch.full_like(tokens_RL, POSITION),
                use_cache=False,
                return_dict=True,
                **{step_name: recorder},
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"{_named(decoder)} does not run a plain forward of tokens, positions and a padding mask: {error}"
        ) from error
    if not returns_cache(output):
        raise UnsupportedModelError(
            f"{_named(decoder)} returns no KV cache, so posenc could not follow which tokens it holds."
        )
    return ProbeRun(recorder.calls, masks, output[0])


@contextmanager
def as_measured(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the block with all sub-modules in eval mode and without gradients or autocast, then restore their modes."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part in training:
            part.training = True


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes; its offloaded weights are on the meta device between forwards."""
    hook: Any = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        weight = next(module.parameters(), None)
        return torch.device("cpu") if weight is None or weight.is_meta else weight.device
    return torch.device(device)


def _named(decoder: Any) -> str:
    return f"{type(decoder).__name__} ({decoder.config.model_type!r})"


def name_of(decoder: nn.Module, module: nn.Module) -> str:
    """Return the path of a sub-module inside the decoder."""
    return next((name for name, part in decoder.named_modules() if part is module), type(module).__name__)


def check_structure(model: nn.Module, decoder: Any) -> None:
    """Refuse models that cannot be served, as far as this shows without running them.

    Raises
    ------
    UnsupportedModelError
        If the model's structure rules it out; the message gives the reason.
    """
    if not hasattr(decoder, "set_attn_implementation"):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} is not a model of transformers whose attention can be replaced."
        )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # imported if any model is sharded
    if fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is sharded by FSDP2 (fully_shard), so its decoder cannot be probed "
            "alone. Apply posenc first, then shard."
        )
    if getattr(decoder.config, "is_causal", None) is False:
        raise UnsupportedModelError(
            f"{_named(decoder)} attends in both directions (is_causal=False in its configuration); plans are causal."
        )
    if hasattr(decoder, "_setup_cache"):
        raise UnsupportedModelError(
            f"{_named(decoder)} keeps its cache inside its layers, where posenc could not follow it."
        )
    parameters = inspect.signature(type(decoder).forward).parameters
    if not any(name in parameters for name in CACHE_NAMES):
        raise UnsupportedModelError(
            f"{_named(decoder)} takes its KV cache under no name that posenc knows ({', '.join(CACHE_NAMES)}; "
            f"transformers {version()})."
        )
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UnsupportedModelError(
            f"{_named(decoder)} takes no further keyword arguments, so nothing can be handed down to its attention."
        )
    if model is not decoder and any(hasattr(part, "get_rope_index") for part in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} counts positions in three dimensions (mrope): a plan of one-dimensional positions "
            "does not apply. Load the text-only model of the family."
        )
    for name, part in decoder.named_modules():
        if any(word in type(part).__name__ for word in ("Indexer", "Compressor")):
            raise UnsupportedModelError(
                f"{_named(decoder)} chooses its keys with a sparse indexer ({name}), which scores rotated keys of its "
                "own: a remap would not reach it."
            )


def _check_calls(decoder: Any, run: ProbeRun, tables: dict[RotarySource, Any]) -> None:
    if not run.calls:
        raise UnsupportedModelError(
            f"no attention layer of {_named(decoder)} hands its queries and keys to transformers' AttentionInterface, "
            "so they are out of reach."
        )
    if not tables:
        raise UnsupportedModelError(
            f"{_named(decoder)} never calls its rotary module: it does not use rotary position embeddings (RoPE)."
        )
    for call in run.calls:
        where = name_of(decoder, call.module)
        if call.k_BHKD.shape[2] != 1 or call.q_BHLD.shape[0] != TOKENS * len(CASES):
            raise UnsupportedModelError(
                f"{_named(decoder)}, layer {where}: attention sees {tuple(call.k_BHKD.shape)} keys for one token of "
                f"{TOKENS * len(CASES)} rows; its keys are not the tokens."
            )
        if not alike(call.v_BHKD):
            raise UnsupportedModelError(f"{_named(decoder)}, layer {where}: the values depend on the rotation.")
    if not alike(run.output):
        raise UnsupportedModelError(
            f"{_named(decoder)} uses rotary positions outside its attention function (a sparse indexer, another "
            "attention that ignores transformers' interface): a remap would not reach them."
        )


def _check_unreached(decoder: Any, unreached: list[nn.Module]) -> None:
    if unreached:
        raise UnsupportedModelError(
            f"{_named(decoder)}: {name_of(decoder, unreached[0])} attends without the keyword arguments of the "
            "forward, and no layer above it gets them either, so posenc cannot tell it the positions."
        )


def _unlikely(source: RotarySource, decoder: Any, module: Any, name: str) -> tuple[bool, bool]:
    """Sort key that puts sources in the layer's own module and of its declared layer type first."""
    types, index = getattr(decoder.config, "layer_types", None), getattr(module, "layer_idx", None)
    declared = types[index] if types and isinstance(index, int) and index < len(types) else None
    return not source.module.startswith(f"{name}."), source.layer_type != declared


def _check_declaration(adapter: ArchitectureAdapter, decoder: Any, facts: Facts) -> None:
    for module, layer in facts.items():
        if adapter.style is not None and layer.source is not None and layer.style != adapter.style:
            raise UnsupportedModelError(
                f"{_named(decoder)}, layer {name_of(decoder, module)} rotates in style {layer.style!r}, and the "
                f"adapter {adapter.name!r} declares {adapter.style!r}."
            )
    if all(layer.source is None for layer in facts.values()):
        raise UnsupportedModelError(f"no attention layer of {_named(decoder)} uses rotary positions (RoPE).")
