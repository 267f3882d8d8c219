"""Options that choose strategies, shared by the verbs that run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from posenc.errors import InvalidConfigError

if TYPE_CHECKING:
    from posenc.config import Config

strategies_option = click.option(
    "--strategy", "-s", "names", multiple=True, metavar="NAME", help="Strategy. Repeat it to compare several."
)
param_option = click.option(
    "--param",
    "-p",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the strategy, such as mapping=128 or 'mapping={c: 192, a: 0.003, b: -2.5}'. Repeatable.",
)


def read_pairs(pairs: tuple[str, ...], *, option: str = "--param") -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs as parameters; values are YAML.

    Raises
    ------
    InvalidConfigError
        If a pair has no ``=``, a key is given twice, or a value is not YAML.
    """
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InvalidConfigError(f"{option} {pair!r}: expected KEY=VALUE, such as mapping=128.")
        if key in values:
            raise InvalidConfigError(f"{option} {key}: given twice.")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InvalidConfigError(f"{option} {pair!r}: the value is not valid YAML.") from None
    return values


def choose_configs(names: tuple[str, ...], params: tuple[str, ...], files: tuple[str, ...]) -> list[Config]:
    """Read the configurations of ``--strategy NAME ... --param K=V ... --config FILE ...``, in that order.

    A file holds one configuration or a list of them. Parameters belong to the one named strategy.

    Raises
    ------
    InvalidConfigError
        If nothing is chosen, there are parameters but not exactly one strategy, or a file or parameter is invalid.
    UnknownNameError
        If a strategy is not installed.
    """
    from posenc.config import read_config

    values = read_pairs(params)
    if values and len(names) != 1:
        raise InvalidConfigError(
            f"--param needs exactly one --strategy, got {len(names)}. To compare several strategies with "
            "parameters, list them in a YAML file and pass it with --config."
        )
    configs = [read_config({"strategy": {"name": name, **values}}, source="--strategy") for name in names]
    for file in files:
        configs += read_configs(file)
    if not configs:
        raise InvalidConfigError("choose a strategy with --strategy NAME or --config FILE; 'posenc list' shows them.")
    for config in configs:
        check_params(config)
    return configs


def read_configs(path: str) -> list[Config]:
    """Read a YAML file that holds one configuration or a list of them."""
    from posenc.config import read_config
    from posenc.files import read_yaml

    data = read_yaml(path)
    if not isinstance(data, list):
        return [read_config(data, source=path)]
    if not data:
        raise InvalidConfigError(f"{path}: the list of configurations is empty.")
    return [read_config(item, source=f"{path}[{position}]") for position, item in enumerate(data)]


def check_params(config: Config) -> None:
    """Raise for an invalid parameter before a model is loaded, so while the window is still unknown."""
    from posenc.params import read_params
    from posenc.plugins import strategies

    for choice in (config.strategy, config.frequencies):
        if choice is not None:
            params = {key: value for key, value in choice.params.items() if key != "window"}
            read_params(strategies()[choice.name].params, params, path=choice.name)


def labels(configs: list[Config]) -> list[str]:
    """Make one distinct label per configuration: equal names get their parameters."""
    names = [config.label for config in configs]
    distinct: list[str] = []
    for label, config in zip(names, configs, strict=True):
        if names.count(label) > 1:
            params = ", ".join(f"{key}={value}" for key, value in config.strategy.params.items())
            label = f"{label} ({params})" if params else label
        while label in distinct:
            label += "'"
        distinct.append(label)
    return distinct
