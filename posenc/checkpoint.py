"""What a checkpoint's configuration says of its positions: the window it was trained for, and its frequencies.

One implementation for transformers' configuration objects, their dictionaries, and whatever has the same attributes.
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
"""Rope types that a checkpoint was trained with wherever they occur: ``max_position_embeddings`` counts them."""

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
"""How the names of families begin whose users put a YaRN block on top, as the model cards say."""

ORIGINAL = "original_max_position_embeddings"
OLD_NAMES = {
    "su": "'su' is the name that longrope had in the first Phi-3 configurations; write 'longrope'",
    "mrope": "'mrope' gives a token several positions, and posenc moves one",
    "axial": "'axial' gives a token several positions, and posenc moves one",
}


def window_of(config: Any) -> int:
    """The window that a checkpoint was trained to read.

    Rope scaling that is part of training (llama3, longrope, the YaRN of gpt-oss and DeepSeek) is counted by
    ``max_position_embeddings``, which is then the window. Of scaling that was put on top for long input (a YaRN block
    in a Qwen, ``dual_chunk_attention_config``), the window is the length that the block starts from. Where a
    configuration has both numbers and nothing tells which, the smaller one is taken, with one warning.

    Parameters
    ----------
    config : configuration, mapping or any object with the same attributes
        Of a language model, or of a model that holds one.

    Returns
    -------
    int
        Tokens.

    Raises
    ------
    UnsupportedModelError
        If the configuration does not tell.
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
    raised = factor is None or longest >= original * float(factor)  # max_position_embeddings may count the scaling
    if raised and not (kind == "yarn" and family.startswith(EXTENDED_BY_YARN)):
        _warn_once(
            f"{_name(config)} ({family!r}) declares two windows, {ORIGINAL}={original} of its {kind} scaling and "
            f"max_position_embeddings={longest}, and nothing tells whether it was trained with that scaling. posenc "
            f"takes {min(original, longest)}; pass window={longest} if it was."
        )
    return min(original, longest)


def rotary_of(config: Any, layer_type: str | None = None) -> Rotary:
    """The frequencies and the attention factor that a checkpoint has, its own scaling included.

    What a configuration does not tell is left at its default: which channels are rotated, and how they are paired.
    Scaling that follows the length (dynamic, longrope) is that of input inside the window.

    Parameters
    ----------
    config : configuration, mapping or any object with the same attributes
        Of a language model, or of a model that holds one.
    layer_type : str, optional
        Where layers have different frequencies (Gemma 3), of which ones, such as ``"full_attention"``.

    Returns
    -------
    Rotary
        ``scaling`` names the rope type, ``theta`` the base before any scaling.

    Raises
    ------
    UnsupportedModelError
        If the configuration does not tell, or layers differ and ``layer_type`` names none of them.
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
            f"{_name(config)} declares no rope_theta: the base of its frequencies is not known. "
            "Pass the frequencies yourself: posenc.Rotary(inv_freq) or Rotary.from_theta(theta, dim)."
        )
    return _rotary(config, kind, float(theta), dict(parameters), layer_type)


def _rotary(config: Any, kind: str, theta: float, parameters: dict[str, Any], layer_type: str | None) -> Rotary:
    from posenc.rope import Rotary
    from posenc.rope_types import frequencies_of

    head_dim, share = _head_dim(config, layer_type), parameters.get("partial_rotary_factor") or 1.0
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2:
        raise UnsupportedModelError(f"{_name(config)}: {rotated} rotated channels of {head_dim} are not pairs of them.")
    try:
        inv_freq, factor = frequencies_of(
            kind,
            {**parameters, "rope_theta": theta, "partial_rotary_factor": share},
            dim=head_dim if kind == "proportional" else rotated,
            longest=_get(config, "max_position_embeddings"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{_name(config)}: its {kind} scaling lacks what its frequencies are computed from: {error}."
        ) from None
    return Rotary(inv_freq, factor, theta=theta, scaling=kind)


def _rope_sets(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters by layer type (None: of all layers), in today's form."""
    declared = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    nested = {key: value for key, value in declared.items() if isinstance(value, Mapping)}
    local = _get(config, "rope_local_base_freq")
    if not nested and local is not None:  # how Gemma 3 declared them before rope_parameters
        nested = {"full_attention": declared, "sliding_attention": {"rope_theta": local}}
    common = {key: _get(config, key) for key in ("rope_theta", "partial_rotary_factor")}
    sets = {}
    for layer_type, parameters in (nested or {None: declared}).items():
        own = {**{key: value for key, value in common.items() if value is not None}, **parameters}
        own["rope_type"] = str(own.get("rope_type") or own.get("type") or "default")
        if own["rope_type"] in ("llama3", "yarn", "longrope"):
            own[ORIGINAL] = _original(config, own) or _get(config, "max_position_embeddings")
        if layer_type is not None and "truncate" in own:
            own["truncate"] = declared.get("truncate", True)  # where transformers reads it
        sets[layer_type] = own
    return sets


def _original(config: Any, parameters: Mapping[str, Any]) -> int | None:
    """The length that scaling starts from; Phi-3 keeps it outside its rope parameters, and that one goes first."""
    value = _get(config, ORIGINAL) or parameters.get(ORIGINAL)
    return None if value is None else _tokens(config, ORIGINAL, value)


def _known_type(config: Any, parameters: Mapping[str, Any]) -> str:
    kind = str(parameters["rope_type"])
    if kind not in ROPE_TYPES:
        why = OLD_NAMES.get(kind, f"posenc and transformers know {', '.join(ROPE_TYPES)}")
        raise UnsupportedModelError(
            f"{_name(config)} declares the rope type {kind!r}, and nobody here can tell its frequencies or what window "
            f"it was trained for: {why}."
        )
    return kind


def _head_dim(config: Any, layer_type: str | None) -> int:
    """Channels of a head that positions may rotate."""
    if getattr(config, "is_heterogeneous", False):  # transformers' word for sizes that differ by layer
        if layer_type is None:
            raise UnsupportedModelError(f"{_name(config)}: the sizes of its layers differ. Pass layer_type.")
        config = config.per_layer_config[layer_type]
    own = "global_head_dim" if layer_type == "full_attention" else "head_dim"
    for key in (own, "head_dim", "qk_rope_head_dim"):
        if _get(config, key):
            return int(_get(config, key))
    hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    if not hidden or not heads:
        raise UnsupportedModelError(f"{_name(config)} declares neither head_dim nor hidden_size and its heads.")
    return int(hidden) // int(heads)


def _language_model(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    if callable(getattr(config, "get_text_config", None)):
        return config.get_text_config(decoder=True)
    inside = _get(config, "text_config")
    return config if inside is None else inside


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
