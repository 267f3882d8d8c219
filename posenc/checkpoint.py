"""Read the pretraining window and the rotary frequencies from a checkpoint's configuration.

The configuration may be an object of transformers, its dictionary, or any object with the same attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from posenc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from posenc.rope import Rotary

logger = logging.getLogger("posenc")

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
TRAINED_SCALINGS = ("llama3", "longrope")
"""Rope types that are always part of training, so that ``max_position_embeddings`` is the trained window."""

TRAINED_WITH_YARN = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "gpt_oss",
    "kimi_k2",
    "ministral3",
    "mistral4",
    "mistral_large4",
    "olmo3",
    "openai_privacy_filter",
)
"""Families whose YaRN block is part of training."""

EXTENDED_BY_YARN = ("qwen",)
"""Prefixes of families whose model cards tell users to add a YaRN block for long input."""

ORIGINAL = "original_max_position_embeddings"
OLD_NAMES = {
    "su": "'su' is the name that longrope had in the first Phi-3 configurations; write 'longrope'",
    "mrope": "'mrope' gives a token several positions, and posenc supports only one",
    "axial": "'axial' gives a token several positions, and posenc supports only one",
}


def window_of(config: Any) -> int:
    """The window that a checkpoint was trained to read.

    If rope scaling is part of training (llama3, longrope, the YaRN of gpt-oss and DeepSeek), the window is
    ``max_position_embeddings``. If scaling was added for long input (a YaRN block in a Qwen,
    ``dual_chunk_attention_config``), the window is the length that the scaling starts from. If a configuration has
    both numbers and does not say which case it is, the smaller one is used, with one warning.

    Parameters
    ----------
    config : configuration, mapping or any object with the same attributes
        Of a language model, or of a model that contains one.

    Returns
    -------
    int
        Tokens.

    Raises
    ------
    UnsupportedModelError
        If the configuration does not declare it.
    """
    config = _language_model(config)
    longest = _tokens(config, "max_position_embeddings", _get(config, "max_position_embeddings"))
    chunked: Any = _get(config, "dual_chunk_attention_config")
    if chunked:
        key = ORIGINAL if _get(chunked, ORIGINAL) else "chunk_size"
        return min(longest, _tokens(config, f"dual_chunk_attention_config.{key}", _get(chunked, key)))
    return min(_window_of_set(config, parameters, longest) for parameters in _rope_sets(config).values())


def _window_of_set(config: Any, parameters: Mapping[str, Any], longest: int) -> int:
    kind, original = _known_type(config, parameters), _original(config, parameters)
    if original is None or original == longest or kind == "default" or kind in TRAINED_SCALINGS:
        return longest
    family = str(_get(config, "model_type") or "")
    if kind == "yarn" and family in TRAINED_WITH_YARN:
        return longest
    factor = parameters.get("factor")
    counted = factor is None or longest >= original * float(factor)  # max_position_embeddings may include the scaling
    if counted and not (kind == "yarn" and family.startswith(EXTENDED_BY_YARN)):
        _warn_once(
            f"{_name(config)} ({family!r}) declares two windows, {ORIGINAL}={original} of its {kind} scaling and "
            f"max_position_embeddings={longest}, and does not say whether it was trained with that scaling. posenc "
            f"uses {min(original, longest)}; pass window={longest} if it was."
        )
    return min(original, longest)


def rotary_of(config: Any, layer_type: str | None = None) -> Rotary:
    """The frequencies and the attention factor of a checkpoint, its own rope scaling included.

    A configuration does not say which channels are rotated and how they are paired; both keep their defaults. For
    scaling that follows the length (dynamic, longrope), the frequencies are those of input inside the window.

    Parameters
    ----------
    config : configuration, mapping or any object with the same attributes
        Of a language model, or of a model that contains one.
    layer_type : str, optional
        Which layers, such as ``"full_attention"``, for a model whose layers have different frequencies (Gemma 3).

    Returns
    -------
    Rotary
        ``scaling`` names the rope type, ``theta`` the base before any scaling.

    Raises
    ------
    UnsupportedModelError
        If the configuration does not declare them, or layers differ and ``layer_type`` names none of them.
    """
    config = _language_model(config)
    sets = _rope_sets(config)
    if layer_type not in sets and (None not in sets):
        raise UnsupportedModelError(
            f"{_name(config)}: frequencies differ by layer type. Pass layer_type, one of {', '.join(map(str, sets))}."
        )
    parameters = sets.get(layer_type, sets.get(None, {}))
    kind, theta = _known_type(config, parameters), parameters.get("rope_theta")
    if theta is None:
        raise UnsupportedModelError(
            f"{_name(config)} declares no rope_theta, so the base of its frequencies is not known. "
            "Pass the frequencies yourself: posenc.Rotary(inv_freq) or Rotary.from_theta(theta, dim)."
        )
    return _rotary(config, kind, float(theta), dict(parameters), layer_type)


def _rotary(config: Any, kind: str, theta: float, parameters: dict[str, Any], layer_type: str | None) -> Rotary:
    from posenc.rope import Rotary
    from posenc.rope.types import frequencies_of

    head_dim, share = _head_dim(config, layer_type), parameters.get("partial_rotary_factor") or 1.0
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2:
        raise UnsupportedModelError(f"{_name(config)}: {rotated} rotated channels of {head_dim} do not form pairs.")
    try:
        inv_freq, factor = frequencies_of(
            kind,
            {**parameters, "rope_theta": theta, "partial_rotary_factor": share},
            dim=head_dim if kind == "proportional" else rotated,
            longest=_get(config, "max_position_embeddings"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{_name(config)}: its {kind} scaling lacks a value that its frequencies depend on: {error}."
        ) from None
    return Rotary(inv_freq, factor, theta=theta, scaling=kind)


def _rope_sets(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters by layer type (None: of all layers), in the form of current configurations."""
    declared = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    nested = {key: value for key, value in declared.items() if isinstance(value, Mapping)}
    local = _get(config, "rope_local_base_freq")
    if not nested and local is not None:  # the form of Gemma 3 before rope_parameters
        nested = {"full_attention": declared, "sliding_attention": {"rope_theta": local}}
    common = {key: _get(config, key) for key in ("rope_theta", "partial_rotary_factor")}
    sets = {}
    for layer_type, parameters in (nested or {None: declared}).items():
        rope = {**{key: value for key, value in common.items() if value is not None}, **parameters}
        rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default")
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):
            rope[ORIGINAL] = _original(config, rope) or _get(config, "max_position_embeddings")
        if layer_type is not None and "truncate" in rope:
            rope["truncate"] = declared.get("truncate", True)  # where transformers reads it
        sets[layer_type] = rope
    return sets


def _original(config: Any, parameters: Mapping[str, Any]) -> int | None:
    """The length that scaling starts from. Phi-3 declares it outside of its rope parameters, which takes precedence."""
    value = _get(config, ORIGINAL) or parameters.get(ORIGINAL)
    return None if value is None else _tokens(config, ORIGINAL, value)


def _known_type(config: Any, parameters: Mapping[str, Any]) -> str:
    kind = str(parameters["rope_type"])
    if kind not in ROPE_TYPES:
        reason = OLD_NAMES.get(kind, f"posenc and transformers know {', '.join(ROPE_TYPES)}")
        raise UnsupportedModelError(
            f"{_name(config)} declares the rope type {kind!r}, so posenc can read neither its frequencies nor the "
            f"window it was trained for: {reason}."
        )
    return kind


def _head_dim(config: Any, layer_type: str | None) -> int:
    """Channels of a head that may be rotated."""
    if getattr(config, "is_heterogeneous", False):  # transformers' name for sizes that differ by layer
        if layer_type is None:
            raise UnsupportedModelError(f"{_name(config)}: the sizes of its layers differ. Pass layer_type.")
        config = config.per_layer_config[layer_type]
    specific = "global_head_dim" if layer_type == "full_attention" else "head_dim"
    for key in (specific, "head_dim", "qk_rope_head_dim"):
        if _get(config, key):
            return int(_get(config, key))
    hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    if not hidden or not heads:
        raise UnsupportedModelError(
            f"{_name(config)} declares neither head_dim nor both hidden_size and num_attention_heads."
        )
    return int(hidden) // int(heads)


def _language_model(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    if callable(getattr(config, "get_text_config", None)):
        return config.get_text_config(decoder=True)
    text_config = _get(config, "text_config")
    return config if text_config is None else text_config


def _tokens(config: Any, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
        raise UnsupportedModelError(
            f"{_name(config)} declares {f'{key}={value!r}' if value else f'no {key}'}: pass window=... (in tokens)."
        )
    return int(value)


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _name(config: Any) -> str:
    return "the configuration" if isinstance(config, Mapping | SimpleNamespace) else type(config).__name__


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
