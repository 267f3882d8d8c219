"""``posenc generate``: continue a prompt under a strategy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from posenc.cli._model import loading_options
from posenc.cli._output import json_option, print_json
from posenc.cli._strategy import choose_configs, param_option
from posenc.errors import InvalidConfigError, InvalidInputError

if TYPE_CHECKING:
    from posenc.evaluate.models import DType

MOST_SEED = 2**63 - 1
LEAST_TEMPERATURE = 1e-6


@click.command("generate", short_help="Continue a prompt under a strategy.")
@click.option("--model", default="tiny", show_default=True, help="'tiny', 'smollm2', a folder or a hub name.")
@click.option("--prompt", metavar="TEXT", help="The prompt.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 file that holds the prompt; '-' reads standard input.")
@click.option("--strategy", "-s", "name", metavar="NAME", help="Strategy (default: rope, the model as it is).")
@param_option
@click.option("--config", "-c", metavar="FILE", help="A YAML configuration instead of --strategy.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to add at most.")
@click.option("--sample", is_flag=True, help="Sample instead of taking the likeliest token.")
@click.option("--temperature", type=float, help="Sampling temperature (default 1.0).")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Seed of the sampling.")
@loading_options
@json_option
def command(
    model: str,
    dtype: DType,
    device: str,
    prompt: str | None,
    prompt_file: str | None,
    name: str | None,
    params: tuple[str, ...],
    config: str | None,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a prompt; the continuation goes to stdout."""
    if (name is not None) and (config is not None):
        raise InvalidConfigError("--strategy and --config exclude each other.")
    if temperature is not None and not sample:
        raise InvalidConfigError("--temperature has an effect with --sample only.")
    if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
        raise InvalidConfigError(f"--temperature: below {LEAST_TEMPERATURE:g} logits overflow. Leave --sample out.")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise InvalidConfigError(f"--temperature: must be above 0, got {temperature}.")
    content = read_prompt(prompt, prompt_file)
    chosen = choose_configs((name or "rope",) if config is None else (), params, (config,) if config else ())
    if len(chosen) > 1:
        raise InvalidConfigError(f"{config}: holds {len(chosen)} configurations, generate takes one.")

    import torch

    from posenc.evaluate.models import ModelSpec, load, pad_token
    from posenc.hf.apply import apply

    loaded = load(ModelSpec(name=model, dtype=dtype, device=device))
    tokens = loaded.tokenizer(content, return_tensors="pt", verbose=False)["input_ids"].to(loaded.model.device)
    if not tokens.shape[1]:
        raise InvalidInputError("the prompt has no tokens.")
    options = {"do_sample": sample, "temperature": (temperature or 1.0) if sample else None}
    torch.manual_seed(seed)
    with loaded.threads(), apply(loaded.model, chosen[0]), torch.no_grad():
        out = loaded.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token(loaded.model),
            **options,
        )
    added = out[0, tokens.shape[1] :]
    said = loaded.tokenizer.decode(added, skip_special_tokens=True)
    if as_json:
        config_data = chosen[0].as_dict()
        print_json({"config": config_data, "prompt_tokens": tokens.shape[1], "new_tokens": len(added), "text": said})
    else:
        click.echo(said)


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt of exactly one of the two options.

    Raises
    ------
    InvalidInputError
        If both or none are given, it cannot be read, is not UTF-8, or is empty.
    """
    if (prompt is None) == (file is None):
        raise InvalidInputError("give the prompt with either --prompt TEXT or --prompt-file FILE.")
    if file == "-":
        prompt = _standard_input()
    elif file is not None:
        from posenc.evaluate.texts import read_text

        # Not read_text's built-in text: a file called "pydoc" is meant here.
        prompt = read_text(Path(file) if file != "pydoc" else Path.cwd() / file).content
    if not prompt:
        raise InvalidInputError("the prompt is empty.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # the bytes of an argument that Python could not decode
        raise InvalidInputError("--prompt: is not text in the encoding of this shell. Use --prompt-file.") from None
    return prompt


def _standard_input() -> str:
    from posenc.evaluate.texts import decode

    if sys.stdin is None:
        raise InvalidInputError("--prompt-file -: there is no standard input. Give a file, or --prompt TEXT.")
    return decode(sys.stdin.buffer.read(), name="standard input")
