"""The command group: it finds verbs by file name, imports a verb when it is used, and prints errors as one message.

The file of a verb holds a click command named ``command``. It imports nothing heavy at its top, because ``--help``
must not wait for torch.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import posenc
from posenc.errors import PosencError

INTERRUPTED = 130


class Failure(click.ClickException):
    """One message on stderr and exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"posenc: {self.format_message()}", file=file, err=file is None)


class VerbGroup(click.Group):
    """A group whose commands are the modules of this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        modules = pkgutil.iter_modules([str(Path(__file__).parent)])
        return sorted(module.name.replace("_", "-") for module in modules if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"posenc.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        verbs = self.list_commands(ctx)
        if name not in verbs and not name.startswith("-"):
            matches = difflib.get_close_matches(name, verbs, n=1, cutoff=0.5)
            hint = f" Did you mean {matches[0]!r}?" if matches else ""
            raise Failure(f"no verb named {name!r}.{hint} Verbs: {', '.join(verbs)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click exits without a message
        except (PosencError, OSError) as error:
            if ctx.params.get("debug"):
                traceback.print_exc(file=sys.stderr)
                ctx.exit(Failure.exit_code)
            raise Failure(_one_message(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


def _one_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}."
    return str(error) or type(error).__name__


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(posenc.__version__, prog_name="posenc")
@click.option("--debug", is_flag=True, help="Show the full traceback of an error (put it before the verb).")
def group(debug: bool) -> None:
    """Read past the pretraining window of any RoPE language model, without training."""


def main() -> None:
    """Entry point of the ``posenc`` command."""
    # Let waiting threads sleep: on a busy machine, spinning threads made SmolLM2 eight times slower than one thread.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        group()
    except KeyboardInterrupt:  # while modules are being imported, before a verb runs
        sys.exit(INTERRUPTED)
