"""A plugin that cannot be loaded, or registers something else, is named and does not affect the others."""

from __future__ import annotations

import pytest

import posenc
from posenc.plugins import discover
from tests.plugins.fakes import GOOD, Install, assert_built_ins_work, failures, shown


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
def test_a_broken_plugin_is_recorded_and_hurts_nobody(install: Install, source: str, entry: str, says: str) -> None:
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


def test_interrupts_are_not_swallowed(install: Install) -> None:
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


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
def test_nonsense_is_refused_and_the_rest_registered(install: Install, thing: str, says: str) -> None:
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
def test_nonsense_of_the_other_seams_is_refused(install: Install, adapter: str, backend: str, says: str) -> None:
    install(NONSENSE.replace("ADAPTER", adapter).replace("BACKEND", backend))
    (failure,) = failures("fake-plugin")
    assert says in failure
    assert posenc.backends()["fine"].distribution == "fake-plugin"
    assert {"reference", "cpu_flash"} <= set(posenc.backends())
    assert "llama" in posenc.adapters()
    assert_built_ins_work()
