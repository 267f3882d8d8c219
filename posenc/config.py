"""Configurations: a YAML file, a dict or a name, checked against one strict model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posenc.errors import InvalidConfigError
from posenc.files import read_yaml
from posenc.params import StrictModel, explain_validation
from posenc.planning.composed import ComposedStrategy
from posenc.plugins import strategies
from posenc.plugins import strategy as make_strategy
from posenc.positions import PositionStrategy

CacheMode = Literal["rotated", "raw"]
"""Whether decoding keeps rotated copies of the raw keys: faster, at the memory of about one more copy of the keys."""


class NamedParams(BaseModel):
    """A strategy by name, with parameters: ``NAME``, ``{name: NAME, param: value}`` or ``{NAME: {param: value}}``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, params),) = value.items()
            if isinstance(params, dict) and "name" not in params:
                return {"name": name, **params}
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        """Every key but ``name``."""
        return dict(self.__pydantic_extra__ or {})

    def make(self, window: int | None) -> PositionStrategy:
        """Make the strategy; a ``window`` among the parameters takes precedence over the argument."""
        params = self.params
        return make_strategy(self.name, window=params.pop("window", window), **params)


class Config(StrictModel):
    """The content of a ``posenc.yaml``.

    Parameters
    ----------
    strategy : name or mapping
        ``NAME`` or ``{name: NAME, param: value, ...}``.
    frequencies : name or mapping, optional
        A frequency strategy to combine with it.
    backend : str
        Attention backend, ``"auto"`` by default.
    cache : {"rotated", "raw"}
        Whether decoding keeps rotated copies of the keys, ``"rotated"`` by default.
    """

    strategy: NamedParams
    frequencies: NamedParams | None = None
    backend: str = Field("auto", min_length=1)
    cache: CacheMode = "rotated"

    @property
    def label(self) -> str:
        """A short name for tables: the strategy, and the frequencies if there are any."""
        name = self.strategy.name
        return name if self.frequencies is None else f"{name}+{self.frequencies.name}"

    def make(self, window: int | None = None) -> PositionStrategy:
        """The strategy this configuration describes, frequencies included."""
        strategy = self.strategy.make(window)
        if self.frequencies is None:
            return strategy
        return ComposedStrategy(strategy, self.frequencies.make(window))

    def as_dict(self) -> dict[str, Any]:
        """Plain data that :func:`read_config` reads back."""
        return self.model_dump(exclude_none=True)


def read_config(value: Any, *, source: str = "") -> Config:
    """Check plain data against :class:`Config`.

    Raises
    ------
    InvalidConfigError
        If a key is wrong; the message names the key path of every problem.
    UnknownNameError
        If no strategy of that name is installed.
    """
    if not isinstance(value, dict):
        raise InvalidConfigError(
            f"{source or 'config'}: expected a mapping with the key 'strategy', got {type(value).__name__}."
        )
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        message = explain_validation(error, path="", known=list(Config.model_fields))
        raise InvalidConfigError(f"{source}: {message}" if source else message) from None
    strategies()[config.strategy.name]  # raise for an unknown name here, not in the first forward
    if config.frequencies is not None:
        strategies()[config.frequencies.name]
    return config


def load_config(path: str | Path) -> Config:
    """Read a ``posenc.yaml``.

    Raises
    ------
    InvalidConfigError
        If the file cannot be read or parsed, or a key is wrong (the key path is named).
    UnknownNameError
        If it names a strategy that is not installed.
    """
    return read_config(read_yaml(path), source=str(path))


def config_of(value: Any) -> Config:
    """Read a configuration from any of its forms: a Config, a dict, the path of a YAML file, or a strategy's name.

    Raises
    ------
    InvalidConfigError
        If a key or a value is wrong, or a file cannot be read.
    UnknownNameError
        If it names a strategy that is not installed.
    """
    if isinstance(value, Config):
        return value
    if isinstance(value, dict):
        return read_config(value if "strategy" in value else {"strategy": value})
    return load_config(value) if _is_path(value) else read_config({"strategy": value})


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith((".yaml", ".yml")))


def resolve_strategy(
    value: Any, window: int | None, frequencies: Any, params: dict[str, Any]
) -> tuple[PositionStrategy, Config | None]:
    """The strategy that a value names or holds, and its configuration if it has one.

    Parameters
    ----------
    value : str, path, dict, Config or PositionStrategy
        Every form that ``apply`` accepts.
    window : int or None
        Pretraining window in tokens.
    frequencies : str, dict, PositionStrategy or None
        Frequencies to combine with it.
    params : dict
        Parameters of a strategy that is given by name.

    Raises
    ------
    InvalidConfigError
        If the value has none of these forms, or ``params`` are given with another form than a name.
    UnknownNameError
        If no strategy of that name is installed.
    """
    config: Config | None = None
    if isinstance(value, dict) or _is_path(value):
        value = config_of(value)
    if params and not isinstance(value, str):
        raise InvalidConfigError(
            f"parameters ({', '.join(sorted(params))}) can only be given with a strategy's name, and this "
            f"{type(value).__name__} has its own."
        )
    if isinstance(value, Config):
        config, strategy = value, value.make(window)
    elif isinstance(value, str):
        strategy = make_strategy(value, window=window, **params)
    elif isinstance(value, PositionStrategy):
        strategy = value
    else:
        raise InvalidConfigError(f"strategy: expected a name, a strategy, a config or a path, got {value!r}.")
    if frequencies is not None:
        if not isinstance(frequencies, PositionStrategy):
            frequencies = _named(frequencies).make(window)
        strategy = ComposedStrategy(strategy, frequencies)
    return strategy, config


def _named(value: Any) -> NamedParams:
    if isinstance(value, str):
        return NamedParams(name=value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return NamedParams(**value)
    raise InvalidConfigError(f"frequencies: expected NAME or {{name: NAME, param: value}}, got {value!r}.")
