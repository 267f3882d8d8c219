"""Discovery of third-party plugins: they are found like the built-ins, filtered, timed, and refused a taken name."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import textwrap

import pytest
from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from posenc.plugins import discover, plugin_records
from tests.plugins.fakes import GOOD, Install, assert_built_ins_work, failures, shown


def test_a_third_party_strategy_is_discovered_like_a_built_in(install: Install) -> None:
    module = install(GOOD.format(name="mine"))
    info = posenc.strategies()["mine"]
    assert (info.distribution, info.paper) == ("fake-plugin", "nobody, 2026")
    assert posenc.strategy("mine", window=8).plan(5).is_identity
    (record,) = [r for r in plugin_records() if r.distribution == "fake-plugin"]
    assert (record.module, record.version, record.failures) == (module, "1.2", ())
    assert record.provides == ("strategy mine",)
    assert next(iter(posenc.strategies())) == "rope"  # built-ins first, whatever the order of sys.path
    assert_built_ins_work()


def test_an_uninstalled_plugin_disappears() -> None:
    assert "mine" not in posenc.strategies()
    assert posenc.strategies().get("mine") is None


def test_a_slow_import_is_shown_with_its_time(install: Install) -> None:
    install("import time; time.sleep(0.3)\n" + textwrap.dedent(GOOD.format(name="slow")), distribution="slow-plugin")
    install(GOOD.format(name="quick"), distribution="quick-plugin")
    seconds = {record.distribution: record.seconds for record in plugin_records()}
    assert seconds["slow-plugin"] >= 0.3 > seconds["quick-plugin"]
    table = CliRunner().invoke(group, ["plugins"]).stdout
    (line,) = [line for line in table.splitlines() if "slow-plugin" in line]
    assert f"{seconds['slow-plugin']:.2f}" in line
    assert {"slow", "quick"} <= set(posenc.strategies())


def test_a_name_claimed_twice_is_refused_until_one_is_chosen(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(GOOD.format(name="lampe"), distribution="rival")
    with pytest.raises(posenc.PluginError, match=r"'lampe' is registered by several distributions: posenc, rival"):
        posenc.strategy("lampe", window=64)
    (failure,) = failures("rival")
    assert "already registered by 'posenc'" in failure
    assert shown() == {"rival": [failure], "posenc": []}
    assert_built_ins_work()
    assert "lampe" in posenc.strategies()
    assert len(list(posenc.strategies().values())) == len(posenc.strategies())  # listing does not raise
    monkeypatch.setenv("POSENC_PLUGINS", "")
    discover.cache_clear()
    assert posenc.strategies()["lampe"].distribution == "posenc"


def test_a_clash_of_two_third_parties_is_refused_too(install: Install) -> None:
    for distribution in ("first", "second"):
        install(GOOD.format(name="shared"), distribution=distribution)
    with pytest.raises(posenc.PluginError, match="first, second"):
        posenc.strategies()["shared"]
    assert_built_ins_work()


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (None, {"one", "two"}),
        ("", set()),
        ("plugin-one", {"one"}),
        (" Plugin_One , plugin.two ", {"one", "two"}),
        ("plugin-three", set()),
    ],
)
def test_posenc_plugins_filters_distributions(
    install: Install, monkeypatch: pytest.MonkeyPatch, chosen: str | None, found: set[str]
) -> None:
    install(GOOD.format(name="one"), distribution="plugin-one")
    install(GOOD.format(name="two"), distribution="Plugin.Two")
    if chosen is not None:
        monkeypatch.setenv("POSENC_PLUGINS", chosen)
    discover.cache_clear()
    assert {"one", "two"} & set(posenc.strategies()) == found
    assert_built_ins_work()


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing ``posenc.x`` sets the attribute ``x`` of the package, which would hide a function of that name."""
    modules = {module.name for module in pkgutil.iter_modules(posenc.__path__)}
    assert modules & set(posenc.__all__) == set()


def test_plans_need_no_torch() -> None:
    code = (
        "import sys, posenc; assert posenc.strategy('rope').plan(3).is_identity; posenc.strategies(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
