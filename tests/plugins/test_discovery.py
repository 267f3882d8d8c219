"""Discovery of third-party plugins, tested with fake distributions on sys.path, including broken ones."""

from __future__ import annotations

import itertools
import json
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from posenc.plugins import discover, plugin_records
from tests.hf import tiny

Install = Callable[..., str]
counter = itertools.count()

GOOD = """
    from posenc import Capabilities, PositionStrategy, hookimpl
    from posenc.plan import PositionPlan

    class Mine(PositionStrategy):
        name = "{name}"
        summary = "for the tests"
        paper = "nobody, 2026"

        def segments(self, lengths):
            return PositionPlan.identity(lengths).segments

    @hookimpl
    def posenc_register_strategies(register):
        register(Mine)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one plugin module on sys.path, and remove it afterwards."""
    monkeypatch.delenv("POSENC_PLUGINS", raising=False)
    modules: list[str] = []

    def add(source: str, distribution: str = "fake-plugin", entry: str = "{module}", version: str = "1.2") -> str:
        number = next(counter)
        module = f"posenc_fake_{number}"
        folder = tmp_path / str(number)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[posenc]\nplugin = {entry.format(module=module)}\n")
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)
        discover.cache_clear()
        return module

    yield add
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    discover.cache_clear()


def failures(distribution: str) -> list[str]:
    return [failure for r in plugin_records() if r.distribution == distribution for failure in r.failures]


def shown() -> dict[str, list[str]]:
    """The failures that ``posenc plugins`` reports, by distribution."""
    result = CliRunner().invoke(group, ["plugins", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, list[str]] = {}
    for record in json.loads(result.stdout):
        found.setdefault(record["distribution"], []).extend(record["failures"])
    return found


def assert_built_ins_work() -> None:
    assert posenc.strategy("self_extend", window_size=4).plan(20).max_relative > 0
    assert posenc.strategies()["rerope"].distribution == "posenc"


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


@pytest.mark.parametrize(
    ("source", "entry", "says"),
    [
        ("import no_such_package_at_all", "{module}", "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("raise RuntimeError('boom at import')", "{module}", "RuntimeError: boom at import"),
        ("import sys; sys.exit('plugin wants out')", "{module}", "SystemExit: plugin wants out"),
        ("def broken(:\n    pass", "{module}", "SyntaxError"),
        ("", "no_such_module_at_all", "ModuleNotFoundError"),
        ("", "{module}:nothing", "AttributeError"),
        ("x = 1", "{module}", "defines none of the hooks"),
        ("posenc_register_strategies = 5", "{module}", "defines none of the hooks"),
        ("answer = 42", "{module}:answer", "defines none of the hooks"),
        ("def answer(): ...", "{module}:answer", "defines none of the hooks"),
        (
            "class Answer:\n    def __getattr__(self, name): raise RuntimeError(name)\nanswer = Answer()",
            "{module}:answer",
            "RuntimeError",
        ),
        (
            """
            from posenc import hookimpl
            @hookimpl
            def posenc_register_strategies(registry, extra): ...
            """,
            "{module}",
            "registry",
        ),
        ("def posenc_register_strategies(): ...", "{module}", "TypeError"),
        (
            """
            from posenc import hookimpl
            @hookimpl
            def posenc_register_strategies(register):
                raise ValueError("boom in the hook")
            """,
            "{module}",
            "posenc_register_strategies: ValueError: boom in the hook",
        ),
    ],
)
def test_a_broken_plugin_is_recorded_and_does_not_affect_others(
    install: Install, source: str, entry: str, says: str
) -> None:
    install(GOOD.format(name="bystander"), distribution="a-good-one")
    install(source, distribution="broken-plugin", entry=entry)
    (failure,) = failures("broken-plugin")
    assert says in failure
    assert failures("a-good-one") == failures("posenc") == []
    assert shown() == {"broken-plugin": [failure], "a-good-one": [], "posenc": []}
    assert "bystander" in posenc.strategies()
    assert_built_ins_work()
    with pytest.raises(posenc.UnknownNameError) as caught:
        posenc.strategy("wanted_from_it")
    assert "failed to load" in str(caught.value)
    assert says.splitlines()[0] in str(caught.value)


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        ("object()", "not a subclass of posenc.PositionStrategy"),
        ("'lampe'", "not a subclass of posenc.PositionStrategy"),
        ("None", "not a subclass of posenc.PositionStrategy"),
        ("int", "not a subclass of posenc.PositionStrategy"),
        ("Nameless", "lacks: name, summary, paper"),
        ("Numbered", "lacks: name"),
        ("Blank", "lacks: name"),
        ("Dicty", "Params must be a subclass"),
        ("Boastful", "capabilities must be"),
        ("Abstract", "does not implement: segments"),
    ],
)
def test_invalid_strategies_are_refused_and_the_rest_registered(install: Install, thing: str, says: str) -> None:
    install(
        """
        from posenc import PositionStrategy

        class Fine(PositionStrategy):
            name, summary, paper = "fine", "s", "p"
            def segments(self, lengths): return ()

        class Nameless(PositionStrategy):
            def segments(self, lengths): return ()

        class Numbered(Fine):
            name = 7

        class Blank(Fine):
            name = " "

        class Dicty(Fine):
            name, Params = "dicty", dict

        class Boastful(Fine):
            name, capabilities = "boastful", {"bounded": True}

        class Abstract(PositionStrategy):
            name, summary, paper = "abstract", "s", "p"

        def posenc_register_strategies(register):
            register(THING)
            register(Fine)
        """.replace("THING", thing)
    )
    (failure,) = failures("fake-plugin")
    assert says in failure
    assert posenc.strategies()["fine"].distribution == "fake-plugin"
    for name in ("dicty", "boastful", "abstract"):
        assert name not in posenc.strategies()
    assert_built_ins_work()


NONSENSE = """
    import torch
    from dataclasses import replace
    from posenc import ArchitectureAdapter, BackendCapabilities
    from posenc.kernels.reference import ReferenceBackend

    adapter = ArchitectureAdapter("theirs", "s", ("their_model",))

    class Fine(ReferenceBackend):
        name = "fine"

    class Nameless(ReferenceBackend):
        name = ""

    class Dicty(Fine):
        name, capabilities = "dicty", {"devices": ["cpu"]}

    class Urgent(Fine):
        name, priority = "urgent", "very"

    class Undecided(Fine):
        name, priority = "undecided", 1000
        def refuses(self, *tensors): raise RuntimeError("ask me later")

    def posenc_register_adapters(register):
        ADAPTER

    def posenc_register_backends(register):
        BACKEND
        register(Fine())
"""


@pytest.mark.parametrize(
    ("adapter", "backend", "says"),
    [
        ("register(ArchitectureAdapter)", "pass", "not an instance of posenc.ArchitectureAdapter"),
        ("register({'name': 'x'})", "pass", "not an instance of posenc.ArchitectureAdapter"),
        ("register(replace(adapter, name=''))", "pass", "adapter ArchitectureAdapter lacks: name"),
        (
            "register(replace(adapter, model_types='llama'))",
            "pass",
            "model_types must be a tuple of names, got 'llama'",
        ),
        ("register(replace(adapter, model_types=()))", "pass", "model_types must be a tuple of names, got ()"),
        ("pass", "register(Fine)", "not an instance of posenc.AttentionBackend"),
        ("pass", "register(Nameless())", "backend Nameless lacks: name"),
        ("pass", "register(Dicty())", "capabilities must be a posenc.BackendCapabilities"),
        ("pass", "register(Urgent())", "priority must be a whole number, got 'very'"),
    ],
)
def test_invalid_adapters_and_backends_are_refused_and_the_rest_registered(
    install: Install, adapter: str, backend: str, says: str
) -> None:
    install(NONSENSE.replace("ADAPTER", adapter).replace("BACKEND", backend))
    (failure,) = failures("fake-plugin")
    assert says in failure
    assert posenc.backends()["fine"].distribution == "fake-plugin"
    assert {"reference", "cpu_flash"} <= set(posenc.backends())
    assert "llama" in posenc.adapters()
    assert_built_ins_work()


def test_a_backend_whose_refuses_fails_does_not_keep_auto_from_the_others(install: Install) -> None:
    import torch

    install(NONSENSE.replace("ADAPTER", "pass").replace("BACKEND", "register(Undecided())"))
    q = torch.randn(1, 1, 3, 8)
    call = partial(posenc.attention, q, q, q, posenc.strategy("rope").plan(3), posenc.Rotary.from_theta(1e4, 8))
    assert call().shape == q.shape
    with pytest.raises(posenc.BackendError, match=r"'undecided' cannot run this case: .*RuntimeError: ask me later"):
        call(backend="undecided")


def test_the_import_time_of_a_plugin_is_shown(install: Install) -> None:
    install("import time; time.sleep(0.3)\n" + textwrap.dedent(GOOD.format(name="slow")), distribution="slow-plugin")
    install(GOOD.format(name="quick"), distribution="quick-plugin")
    seconds = {record.distribution: record.seconds for record in plugin_records()}
    assert seconds["slow-plugin"] >= 0.3 > seconds["quick-plugin"]
    table = CliRunner().invoke(group, ["plugins"]).stdout
    (line,) = [line for line in table.splitlines() if "slow-plugin" in line]
    assert f"{seconds['slow-plugin']:.2f}" in line
    assert {"slow", "quick"} <= set(posenc.strategies())


WRONG = """
    from posenc import PositionStrategy, Segment

    class Wrong(PositionStrategy):
        name, summary, paper = "wrong", "s", "p"
        def segments(self, lengths):
            BODY

    def posenc_register_strategies(register):
        register(Wrong)
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return ()", r"pair (i=0, j=0) is attended by no segment"),
        ("return None", "segments must be a sequence of Segment, got None"),
        ("return [1 / 0]", "ZeroDivisionError: division by zero"),
        ("return ['near', 'far']", "one of them is 'near'"),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, None, i, i / 0)]",
            "segment 'a': key_positions hold a NaN or an infinity",
        ),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, 9, i, i)]",
            "is attended by no segment",
        ),
        (
            "i = lengths.indices; return [Segment.band('a', lengths.total, 0, None, i, i, 'cubic')]",
            "interpolation must be 'positions' or 'logits', got 'cubic'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_strategy_that_breaks_an_invariant_is_named_and_does_not_affect_others(
    install: Install, body: str, says: str
) -> None:
    install(WRONG.replace("BODY", body), distribution="wrong-plugin")
    install(GOOD.format(name="bystander"), distribution="a-good-one")
    assert failures("wrong-plugin") == []  # the fault shows only in its plans
    found = shown()
    (failure,) = found["wrong-plugin"]
    assert failure.startswith("strategy wrong: PluginError: strategy 'wrong'")
    assert says in failure
    assert found["a-good-one"] == found["posenc"] == []
    refused = CliRunner().invoke(group, ["plan", "wrong", "--prompt", "40"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("posenc: strategy 'wrong'")
    assert "Traceback" not in refused.output
    model = tiny.make("llama")
    with pytest.raises(posenc.PluginError, match="strategy 'wrong'"):
        posenc.apply(model, "wrong")
    assert posenc.attached(model) is None
    with posenc.apply(model, "bystander") as handle:  # the same model accepts the strategy of another plugin
        assert handle.strategy.name == "bystander"
    assert_built_ins_work()


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


def test_interrupts_are_not_swallowed(install: Install) -> None:
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


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
