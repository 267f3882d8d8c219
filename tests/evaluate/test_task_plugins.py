"""Tasks are a hook: a third party's are found, measured and reported like the built-in ones."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from posenc.cli._group import group
from posenc.errors import InvalidConfigError, PluginError, UnknownNameError
from posenc.evaluate.sweep import run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.tasks import read_task
from posenc.evaluate.tasks.prose import Perplexity
from posenc.plugins import discover, plugin_records, tasks
from posenc.report.write import write_report

Install = Callable[[str], None]
counter = itertools.count()

PASSWORD = """
    import posenc
    from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, hide

    class Password(QuestionTask):
        name = "password"
        summary = "one word in the middle of the text"

        hint: str = "The password is"

        def questions(self, source, length, rng):
            word = str(rng.choice(["amber", "coral", "walnut"]))
            needles = [(0.5, f" {self.hint} {word}. ")]
            (prompt,) = hide(source, length, rng, what=self.name, needles=needles, questions=[f" {self.hint}"])
            return [Question(prompt, (Reference(word, depth=0.5),), new_tokens=8)]

    @posenc.hookimpl
    def posenc_register_tasks(register):
        register(Password)
"""

WRONG = """
    import posenc
    from posenc.evaluate.tasks.base import Task

    class Whole(Task):
        name, summary = "whole", "complete"

        def check(self, source, length, seed): ...
        def measure(self, subject, source, length, seed): ...

    class Nameless(Whole):
        name = ""

    class Metric(Whole):
        metric = "seconds"

    class Setting(Whole):
        task: str = "x"

    class Abstract(Task):
        name, summary = "abstract", "lacks its methods"

    class Perplexity(Whole):
        name = "perplexity"

    @posenc.hookimpl
    def posenc_register_tasks(register):
        register(ITEM)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one plugin module on sys.path; removed afterwards."""
    monkeypatch.delenv("POSENC_PLUGINS", raising=False)
    modules: list[str] = []

    def add(source: str) -> None:
        module = f"posenc_task_plugin_{next(counter)}"
        folder = tmp_path / module
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: task-plugin\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[posenc]\nplugin = {module}\n")
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)
        discover.cache_clear()

    yield add
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    discover.cache_clear()


def failure() -> str:
    """What is wrong with the installed plugin."""
    (record,) = [record for record in plugin_records() if record.distribution == "task-plugin"]
    return " ".join(record.failures)


def test_a_third_partys_task_runs_in_a_suite(install: Install, tmp_path: Path):
    install(PASSWORD)
    assert tasks()["password"].distribution == "task-plugin"
    assert tasks()["password"].settings == ("text", "documents", "hint")
    suite = {
        "name": "third-party",
        "lengths": [200],
        "strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 96}}],
        "tasks": [{"task": "password", "documents": 2, "hint": "The secret is"}],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    sweep = run.execute(run.plan(path, tmp_path / "out"), Execution())
    assert [cell.task for cell in sweep.cells] == ["password (hint=The secret is)"] * 2
    for cell in sweep.cells:
        assert cell.samples is not None
        assert [(sample.document, sample.depth) for sample in cell.samples] == [(0, 0.5), (1, 0.5)]
        assert all(sample.expected in ("amber", "coral", "walnut") for sample in cell.samples)
    _, markdown = write_report([tmp_path / "out"], tmp_path)
    assert "password (hint=The secret is): share right" in markdown.read_text()


def test_its_settings_are_checked(install: Install):
    install(PASSWORD)
    with pytest.raises(InvalidConfigError, match=r"suite\.hnt: no such key\. Known keys: text, documents, hint"):
        read_task({"task": "password", "hnt": "x"}, source="suite")


def test_it_is_gone_when_uninstalled():
    with pytest.raises(UnknownNameError, match=r"suite: no task named 'passwort'\. Did you mean 'passkey'\?"):
        read_task("passwort", source="suite")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("Whole()", "not a subclass of posenc.evaluate.tasks.base.Task"),
        ("str", "not a subclass of posenc.evaluate.tasks.base.Task"),
        ("Nameless", "task class Nameless lacks: name"),
        ("Metric", "task 'whole': metric must be 'loss' or 'accuracy', got 'seconds'"),
        ("Setting", "task 'whole': its setting 'task' has the name of a suite's own key"),
        ("Abstract", "task 'abstract' does not implement: check, measure"),
        ("Perplexity", "task 'perplexity' is already registered by 'posenc'"),
    ],
)
def test_what_is_no_task_is_refused(item: str, said: str, install: Install):
    install(WRONG.replace("ITEM", item))
    assert said in failure()
    assert tasks()["spans"].distribution == "posenc"


def test_a_name_claimed_twice_raises_in_a_suite(install: Install):
    install(WRONG.replace("ITEM", "Perplexity"))
    with pytest.raises(PluginError, match="registered by several distributions: posenc, task-plugin"):
        read_task("perplexity", source="suite")


def test_list_shows_every_task(install: Install):
    from click.testing import CliRunner

    install(PASSWORD)
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(group, ["list", "--tasks"]).stdout
    assert f"tasks ({len(tasks())})" in shown
    assert "one word in the middle of the text" in shown
    assert tasks()["perplexity"].factory is Perplexity
