"""The files of the demo: every configuration in examples/ is valid and shows what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from posenc.cli._strategy import choose_configs, labels, read_configs
from posenc.evaluate import demo
from posenc.evaluate.models import TINY, load

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_example_configuration_makes_its_strategies(file: Path):
    configs = choose_configs((), (), (str(file),))
    for config in configs:
        config.make(window=256).plan(2048)


def test_the_demo_compares_its_five_strategies():
    configs = read_configs(str(demo.find_config()))
    assert labels(configs) == ["rope", "yarn", "self_extend", "rerope", "lampe"]


def test_every_remapping_of_the_demo_stays_inside_the_window():
    for config in read_configs(str(demo.find_config())):
        plan = config.make(window=256).plan(2048)
        if config.strategy.name not in ("rope", "yarn"):
            assert plan.max_relative < 256


def test_the_demo_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert demo.find_config().is_file()


def test_the_shipped_model_breaks_natively_and_lampe_repairs_it():
    from posenc.evaluate.compare import compare, prepare
    from posenc.evaluate.tasks.base import Source
    from posenc.evaluate.texts import read_text

    loaded = load(TINY)
    assert loaded.window == 256
    source = Source(loaded.tokenizer, read_text())
    comparison = prepare(source, (256, 1024), scored=128, documents=10, retrieval_documents=10)
    configs = {name: c for c in read_configs(str(demo.find_config())) if (name := c.strategy.name) in ("rope", "lampe")}
    steps: list[str] = []
    scores = compare(loaded, configs, comparison, steps.append)
    assert len(steps) == comparison.steps(2) == 2 * 2 * 20
    native, lampe = scores["rope"], scores["lampe"]
    assert native.perplexity[1024].value > 1.5 * lampe.perplexity[1024].value
    assert native.retrieval[256].scores.mean > 0.6
    assert native.retrieval[1024].scores.mean < 0.3 < 0.5 < lampe.retrieval[1024].scores.mean
