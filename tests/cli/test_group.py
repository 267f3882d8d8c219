"""The command group: fast help, one message per error, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from posenc.cli._group import INTERRUPTED, VerbGroup, group
from posenc.cli._model import DTYPES
from posenc.errors import PosencError
from posenc.evaluate.models import DType

VERBS = sorted(group.list_commands(click.Context(group)))
HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "matplotlib", "yaml", "pluggy", "posenc_plugins")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_every_file_is_a_verb():
    assert {"demo", "doctor", "generate", "list", "plan", "plugins", "ppl", "show"} <= set(VERBS)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS), ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]):
    ran = python(
        f"import sys\nsys.argv = ['posenc', *{arguments!r}]\nfrom posenc.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"loaded = sorted(name for name in {HEAVY!r} if name in sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_the_offered_dtypes_are_those_of_a_model():
    assert get_args(DType) == DTYPES


def test_help_of_one_verb_does_not_import_the_others():
    ran = python(
        "import sys\nsys.argv = ['posenc', 'show', '--help']\nfrom posenc.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'posenc.cli.show' in sys.modules and 'posenc.cli.demo' not in sys.modules"
    )
    assert ran.returncode == 0, ran.stderr


def test_every_verb_has_a_short_help(run):
    listed = run("--help").stdout
    for verb in VERBS:
        line = next(line for line in listed.splitlines() if line.split()[:1] == [verb])
        assert len(line.split()) > 2
        assert not line.endswith("..."), f"the first sentence of {verb} is too long for the list of verbs"


def test_an_unknown_verb_suggests_the_nearest(run):
    result = run("plann", "lampe")
    assert result.exit_code == 2
    assert "no verb named 'plann'. Did you mean 'plan'?" in result.stderr


def test_an_unknown_option_is_a_usage_error(run):
    assert run("plan", "--promt", "3").exit_code == 2


def one_verb(error: BaseException) -> click.Group:
    """Return a group like ours, with one verb that raises."""

    class Failing(VerbGroup):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return ["fail"]

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            @click.command("fail")
            def fail() -> None:
                raise error

            return fail

    return Failing("posenc", params=[click.Option(["--debug"], is_flag=True)])


def test_an_error_is_one_message_and_status_2():
    result = CliRunner().invoke(one_verb(PosencError("the what. the why.")), ["fail"])
    assert (result.exit_code, result.stderr, result.stdout) == (2, "posenc: the what. the why.\n", "")


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(one_verb(PosencError("the what.")), ["--debug", "fail"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("PosencError: the what.")


def test_a_file_error_names_the_file():
    error = PermissionError(13, "Permission denied", "secret.txt")
    result = CliRunner().invoke(one_verb(error), ["fail"])
    assert (result.exit_code, result.stderr) == (2, "posenc: secret.txt: Permission denied.\n")


def test_an_interrupt_exits_cleanly():
    result = CliRunner().invoke(one_verb(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == INTERRUPTED
    assert "Traceback" not in result.stderr


def test_a_bug_is_not_hidden():
    result = CliRunner().invoke(one_verb(ZeroDivisionError("bug")), ["fail"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently on Windows")
def test_a_closed_pipe_is_quiet():
    posenc = Path(sys.executable).parent / "posenc"
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{posenc}' plan rope --prompt 50 | true"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in ran.stderr
    assert "Broken pipe" not in ran.stderr


def test_the_installed_command_runs():
    posenc = Path(sys.executable).parent / "posenc"
    ran = subprocess.run([posenc, "plan", "rope", "--prompt", "0"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr == "posenc: prompt must be at least 1 token, got 0.\n"
