"""posenc.yaml: which files are read, which are refused, and which key path the message names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import posenc
from posenc.config import Config, read_config
from posenc.planning.composed import ComposedStrategy


def write(folder: Path, content: Any) -> Path:
    file = folder / "posenc.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_a_name_is_enough(tmp_path: Path) -> None:
    config = posenc.load_config(write(tmp_path, "strategy: rerope\n"))
    assert isinstance(config, Config)
    assert config.backend == "auto"
    assert config.make(64).name == "rerope"
    assert config.as_dict() == {"strategy": {"name": "rerope"}, "backend": "auto", "cache": "rotated"}


def test_parameters_sit_beside_the_name(tmp_path: Path) -> None:
    content = {"strategy": {"name": "self_extend", "group": 4, "window_size": 10}, "backend": "reference"}
    config = posenc.load_config(write(tmp_path, content))
    strategy = config.make()
    assert (strategy.params.group, strategy.params.window_size, config.backend) == (4, 10, "reference")
    assert read_config(config.as_dict()) == config


def test_a_window_in_the_file_takes_precedence(tmp_path: Path) -> None:
    config = posenc.load_config(write(tmp_path, {"strategy": {"name": "rerope", "window": 80}}))
    assert config.make(640).window == 80


def test_lampe_with_yarn_has_the_positions_of_one_and_the_frequencies_of_the_other(tmp_path: Path) -> None:
    content = {
        "strategy": {"name": "lampe", "mapping": {"c": 60, "a": 0.01, "b": 0}, "active_from": 50},
        "frequencies": {"name": "yarn", "factor": 2},
    }
    both = posenc.load_config(write(tmp_path, content)).make(128)
    assert isinstance(both, ComposedStrategy)
    assert both.name == "lampe+yarn"
    alone = posenc.strategy("lampe", window=128, mapping={"c": 60, "a": 0.01, "b": 0}, active_from=50)
    plan, expected = both.plan(300, 310), alone.plan(300, 310)
    np.testing.assert_array_equal(plan.relative_positions(), expected.relative_positions())
    np.testing.assert_array_equal(plan.query_scale, expected.query_scale)
    assert both.plan(50).is_identity
    assert not both.plan(51).is_identity
    base = posenc.Rotary.from_theta(10000.0, 16)
    yarn = posenc.strategy("yarn", window=128, factor=2)
    rotary, expected_rotary = both.rotary(base, 300), yarn.rotary(base, 300)
    assert rotary.inv_freq.equal(expected_rotary.inv_freq)
    assert rotary.attention_scaling == expected_rotary.attention_scaling != 1
    assert both.capabilities.changes_frequencies
    assert both.capabilities.bounded == alone.capabilities.bounded
    assert both.replan == "auto"
    assert both.describe()["frequencies"] == {"name": "yarn", "factor": 2.0}
    for text in (alone.paper, yarn.paper):
        assert text in both.paper


def test_only_one_strategy_of_each_kind_can_be_composed() -> None:
    with pytest.raises(posenc.InvalidConfigError, match=r"^frequencies\.name: 'rerope' does not change frequencies"):
        read_config({"strategy": "lampe", "frequencies": "rerope"}).make(64)
    with pytest.raises(posenc.InvalidConfigError, match="'yarn' changes frequencies itself"):
        read_config({"strategy": "yarn", "frequencies": "ntk"}).make(64)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("strategy: [", "is not valid YAML"),
        ("", "expected a mapping with the key 'strategy', got NoneType"),
        ("- lampe\n", "expected a mapping with the key 'strategy', got list"),
        ("lampe", "got str"),
        ("backend: auto\n", "strategy: Field required"),
        ("strategy: rope\nstrategies: x\n", "strategies: no such key. Known keys: strategy, frequencies, backend"),
        ("strategy: 7\n", "strategy: "),
        ("strategy: {group: 4}\n", "strategy.name: Field required"),
        ("strategy: {name: 4}\n", "strategy.name: Input should be a valid string (got 4)"),
        ("strategy: rope\nbackend: ''\n", "backend: "),
        ("strategy: rope\nbackend: 3\n", "backend: Input should be a valid string"),
        ("strategy: rope\nfrequencies: [yarn]\n", "frequencies: "),
    ],
)
def test_bad_files_name_the_file_and_the_key(content: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(posenc.InvalidConfigError) as caught:
        posenc.load_config(file)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(posenc.InvalidConfigError, match="cannot be read"):
        posenc.load_config(tmp_path / "missing.yaml")
    with pytest.raises(posenc.InvalidConfigError, match="cannot be read"):
        posenc.load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(posenc.InvalidConfigError, match="not UTF-8"):
        posenc.load_config(binary)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    file = write(tmp_path, "strategy: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(posenc.InvalidConfigError, match="not valid YAML"):
        posenc.load_config(file)


@pytest.mark.parametrize("where", ["strategy", "frequencies"])
def test_unknown_names_are_errors_when_the_file_is_read(where: str, tmp_path: Path) -> None:
    content = {"strategy": "rope", where: "yarm"}
    with pytest.raises(posenc.UnknownNameError, match="Did you mean 'yarn'"):
        posenc.load_config(write(tmp_path, content))


def test_wrong_parameters_name_the_strategy_and_the_key(tmp_path: Path) -> None:
    config = posenc.load_config(write(tmp_path, {"strategy": {"name": "self_extend", "gruop": 4}}))
    with pytest.raises(posenc.InvalidConfigError, match=r"^self_extend\.gruop: no such key"):
        config.make(64)
