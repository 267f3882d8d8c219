"""``posenc lm-eval``: lm-evaluation-harness with the additional model type ``posenc``."""

from __future__ import annotations

import click


@click.command(
    "lm-eval",
    short_help="Run lm-evaluation-harness with --model posenc.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness, which gets all arguments, with the additional model type 'posenc':

    \b
        posenc lm-eval --model posenc --model_args pretrained=tiny,strategy=lampe,mapping=128 \\
            --tasks TASK --include_path FOLDER

    Give the parameters of the strategy as model_args, or in a file: config=posenc.yaml. Inputs may be up to 16 windows
    long, or max_length=N tokens. 'posenc lm-eval run --help' shows the help of the harness.
    """
    if not arguments or arguments in (("--help",), ("-h",)):
        click.echo(ctx.get_help())
        return
    from posenc.evaluate.harness import run

    run(arguments)
