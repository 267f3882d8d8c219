"""What a strategy declares (parameters, capabilities, the keys a cache must keep) and the fingerprint of a model.

The contract suite tests every declaration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from posenc.errors import InvalidConfigError


@dataclass(frozen=True)
class Capabilities:
    """What a strategy promises; the contract suite tests exactly this.

    Parameters
    ----------
    bounded : bool
        With default parameters every plan with ``total == prompt`` has ``max_relative < window``,
        for windows of at least 16 tokens and prompts up to ``window ** 2 / 8``.
    monotone : bool
        For a fixed query the relative distance is non-decreasing in ``d``.
    drops_keys : bool
        Some pairs are attended by no segment.
    uses_prompt : bool
        The plan depends on ``prompt``, not on ``total`` alone.
    changes_frequencies : bool
        ``rotary`` returns something other than its argument.
    frequencies_by_length : bool
        ``rotary`` depends on ``prompt``.
    positions_per_frequency : bool
        Positions may have a column for every rotary frequency of the model, [L, F].
    """

    bounded: bool = False
    monotone: bool = True
    drops_keys: bool = False
    uses_prompt: bool = False
    changes_frequencies: bool = False
    frequencies_by_length: bool = False
    positions_per_frequency: bool = False


@dataclass(frozen=True)
class Retention:
    """The keys that a strategy attends however long the text grows; a cache may drop all others.

    A strategy that returns it promises two things about every query ``i >= first + last``: the query attends only keys
    ``j < first`` and ``j > i - last``, and it sees them exactly as query ``first + last`` does, at the same relative
    positions and with the same scale. So the text without the dropped keys has the same plan.

    Parameters
    ----------
    first : int
        Keys at the beginning of the text (attention sinks).
    last : int
        Nearest keys, the query's own included, at least 1.
    """

    first: int
    last: int


class StrictModel(BaseModel):
    """Data of one fixed form: unknown keys are errors, and values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(StrictModel):
    """What identifies a model: architecture, window, rotary parameters and a hash of weights.

    Parameters
    ----------
    model_type : str
        Family, as transformers names it.
    window : int
        Pretraining window in tokens.
    hidden_size, layers, heads, key_value_heads, vocabulary : int, optional
        Sizes, where the configuration declares them.
    rope : dict
        ``rope_parameters`` of the configuration.
    weights : str
        Hash of the first values of every tensor of the decoder, rounded to bfloat16: loading the same
        checkpoint in another dtype does not change it, training does.
    """

    model_type: str
    window: PositiveInt
    hidden_size: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    key_value_heads: PositiveInt | None = None
    vocabulary: PositiveInt | None = None
    rope: dict[str, Any] = {}
    weights: str

    def differences(self, other: Fingerprint) -> list[str]:
        """``"layers: 3 and 30"`` for every fact that differs, this model's value first."""
        left, right = self.model_dump(), other.model_dump()
        return [f"{key}: {left[key]} and {right[key]}" for key in left if left[key] != right[key]]

    def __str__(self) -> str:
        return f"{self.model_type}, {self.layers} layers, hidden size {self.hidden_size}, window {self.window}"


class Params(StrictModel):
    """Base of every parameter model."""


class RemapParams(Params):
    """Parameters that every remapping strategy takes."""

    active_from: NonNegativeInt = Field(0, description="prompts of up to this many tokens get the identity plan")
    replan: Literal["auto", "never"] | PositiveInt = Field(
        "auto",
        description="long generation: 'auto' re-plans before a distance leaves the window, 'never' keeps the first "
        "plan, a number re-plans whenever that many new tokens were generated",
    )


def read_params(model: type[Params], values: dict[str, Any], *, path: str) -> Params:
    """Validate parameters; raises InvalidConfigError, naming the key path."""
    try:
        return model(**values)
    except ValidationError as error:
        raise InvalidConfigError(explain_validation(error, path=path, known=list(model.model_fields))) from None


def explain_validation(error: ValidationError, *, path: str, known: list[str]) -> str:
    """One line per problem of a pydantic error: key path, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        where = ".".join([path, *(str(part) for part in problem["loc"])] if path else map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: no such key. Known keys: {', '.join(known) or 'none'}.")
        else:
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem.get('input')!r}).")
    return "\n".join(dict.fromkeys(lines))
