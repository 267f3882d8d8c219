"""A second plugin that claims the name ``rope`` affects only those who ask for that strategy by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import posenc
from posenc.bench.sides import build
from posenc.calibration.file import read
from posenc.calibration.recommend import find_profile, recommend
from posenc.display.explore.app import make_app
from posenc.hf.apply import find_adapter
from posenc.hf.fingerprint import fingerprint
from posenc.positions import IdentityStrategy
from tests.bench.conftest import small
from tests.hf import tiny
from tests.plugins.fakes import GOOD, Install, failures

PROFILE = Path(posenc.__file__).parent / "profiles" / "tiny.yaml"


@pytest.fixture(autouse=True)
def _stray(install: Install) -> None:
    install(GOOD.format(name="rope"), distribution="stray")
    (failure,) = failures("stray")
    assert "'rope' is already registered by 'posenc'" in failure


def test_only_asking_for_it_by_name_raises() -> None:
    model = tiny.make("llama")
    asks = (
        lambda: posenc.strategy("rope"),
        lambda: posenc.apply(model, "rope"),
        lambda: posenc.apply(model, {"strategy": "rope"}),
    )
    for ask in asks:
        with pytest.raises(posenc.PluginError, match=r"'rope' is registered by several distributions: posenc, stray"):
            ask()
    assert posenc.attached(model) is None


@pytest.mark.parametrize(
    ("name", "params"),
    [("lampe", {"mapping": 40}), ("rerope", {"frequencies": "yarn", "active_from": 20}), ("dynamic", {})],
)
def test_other_strategies_are_applied(name: str, params: dict[str, object]) -> None:
    model = tiny.make("llama")
    ids = tiny.tokens(1, 2 * tiny.WINDOW)
    with torch.no_grad():
        stock = model(ids).logits
        with posenc.apply(model, name, **params):
            assert not torch.equal(model(ids).logits, stock)
        assert torch.equal(model(ids).logits, stock)


def test_plans_are_made_and_the_identity_is_recognised() -> None:
    for name in posenc.strategies():
        if name not in ("rope", "auto"):
            posenc.strategy(name, window=64).checked_plan(100, 120)
    assert posenc.strategy("rerope", window=64, active_from=50).plan(50).is_identity


def test_calibrations_that_pick_rope_are_read_and_used() -> None:
    profile = read(PROFILE)
    window = profile.model.fingerprint.window
    longer = profile.settings.model_copy(update={"lengths": tuple(n for n in profile.lengths if n > window)})
    table = recommend(profile.model_copy(update={"settings": longer}), source="a test")
    assert [part.pick.strategy for part in table.ranges][:2] == ["rope", "lampe"]
    auto = posenc.strategy("auto", window=window, calibration=table)
    assert auto.plan(window).is_identity
    assert not auto.plan(window + 1).is_identity
    model = tiny.make("llama")
    assert find_profile(fingerprint(model, find_adapter(model))) is None  # every shipped profile is read for this


@pytest.mark.parametrize("kind", ["attention", "decode"])
def test_the_baseline_of_the_bench_runs(kind: str) -> None:
    case = small(kind)
    assert isinstance(case.baseline.make_strategy(), IdentityStrategy)
    with torch.no_grad():
        pair = build(case)
        assert pair.plain().shape == pair.remapped().shape


def test_the_page_of_explore_is_shown() -> None:
    client = make_app(name="rerope", window=256, prompt=1024).test_client()
    assert client.get("/").status_code == 200
    answer = client.get("/", query_string={"strategy": "rope", "window": "256", "prompt": "100"})
    assert answer.status_code == 400
    assert "registered by several distributions" in answer.get_data(as_text=True)
