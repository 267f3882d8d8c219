"""``posenc generate``: continue a prompt under a strategy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posenc.cli._model import load_model, loading_options, model_option
from posenc.cli._output import json_option, print_json
from posenc.cli._strategy import choose_configs, param_option
from posenc.errors import InvalidConfigError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from posenc.config import Config
    from posenc.evaluate.models import DType, Loaded

MOST_SEED = 2**63 - 1
LEAST_TEMPERATURE = 1e-6


@click.command("generate", short_help="Continue a prompt under a strategy.")
@model_option
@click.option("--prompt", metavar="TEXT", help="The prompt.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 file that holds the prompt; '-' reads standard input.")
@click.option("--strategy", "-s", "name", metavar="NAME", help="Strategy (default: rope, the model as it is).")
@param_option
@click.option("--config", "-c", metavar="FILE", help="A YAML configuration instead of --strategy.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to add at most.")
@click.option("--sample", is_flag=True, help="Sample instead of taking the most likely token.")
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
    check_sampling(sample, temperature)
    choice = read_choice(name, params, config)
    content = read_prompt(prompt, prompt_file)
    loaded = load_model(model, dtype, device)
    prompt_tokens = tokenize_prompt(loaded, content)
    sampling = {"do_sample": sample, "temperature": (temperature or 1.0) if sample else None}
    new_tokens = continue_prompt(loaded, choice, prompt_tokens, seed, max_new_tokens=max_new_tokens, **sampling)
    text = loaded.tokenizer.decode(new_tokens, skip_special_tokens=True)
    if as_json:
        counts = {"prompt_tokens": prompt_tokens.shape[1], "new_tokens": len(new_tokens)}
        print_json({"config": choice.as_dict(), **counts, "text": text})
    else:
        click.echo(text)


def check_sampling(sample: bool, temperature: float | None) -> None:
    """Check the options of sampling.

    Raises
    ------
    InvalidConfigError
        If there is a temperature without sampling, or one that is not a number above 0, or so low that logits overflow.
    """
    if temperature is None:
        return
    if not sample:
        raise InvalidConfigError("--temperature has an effect with --sample only.")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InvalidConfigError(f"--temperature: below {LEAST_TEMPERATURE:g} logits overflow. Leave --sample out.")
    if not 0 < temperature < float("inf"):
        raise InvalidConfigError(f"--temperature: must be above 0, got {temperature}.")


def read_choice(name: str | None, params: tuple[str, ...], file: str | None) -> Config:
    """Read the one configuration that ``--strategy`` and ``--param``, or ``--config``, choose.

    Raises
    ------
    InvalidConfigError
        If both are given, a parameter is invalid, or the file does not hold exactly one valid configuration.
    """
    if name is not None and file is not None:
        raise InvalidConfigError("--strategy and --config exclude each other.")
    names, files = ((name or "rope",), ()) if file is None else ((), (file,))
    configs = choose_configs(names, params, files)
    if len(configs) > 1:
        raise InvalidConfigError(f"{file}: holds {len(configs)} configurations, generate takes one.")
    return configs[0]


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Read the prompt of exactly one of the two options.

    Raises
    ------
    InvalidInputError
        If both or neither are given, or the prompt cannot be read, is not UTF-8, or is empty.
    """
    if (prompt is None) == (file is None):
        raise InvalidInputError("give the prompt with either --prompt TEXT or --prompt-file FILE.")
    if file is not None:
        prompt = _read_file(file)
    if not prompt:
        raise InvalidInputError("the prompt is empty.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # bytes of an argument that Python could not decode
        raise InvalidInputError("--prompt: is not text in the encoding of this shell. Use --prompt-file.") from None
    return prompt


def _read_file(file: str) -> str:
    """Read a file, or standard input for ``-``."""
    from posenc.evaluate.texts import decode, read_text

    if file != "-":
        # read_text takes the name "pydoc" for its built-in text; here it is a file of that name.
        return read_text(Path(file) if file != "pydoc" else Path.cwd() / file).content
    if sys.stdin is None:
        raise InvalidInputError("--prompt-file -: there is no standard input. Give a file, or --prompt TEXT.")
    return decode(sys.stdin.buffer.read(), name="standard input")


def tokenize_prompt(loaded: Loaded, prompt: str) -> Tensor:
    """Tokenize a prompt; returns int64 [1, L] on the model's device.

    Raises
    ------
    InvalidInputError
        If the prompt has no tokens.
    """
    tokens: Tensor = loaded.tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    if not tokens.shape[1]:
        raise InvalidInputError("the prompt has no tokens.")
    return tokens.to(loaded.model.device)


def continue_prompt(loaded: Loaded, config: Config, prompt_tokens: Tensor, seed: int, **options: Any) -> Tensor:
    """Generate under a strategy; returns the new tokens, int64 [N].

    Parameters
    ----------
    seed : int
        Seed of the sampling.
    **options
        Passed to ``model.generate``.
    """
    import torch

    from posenc.evaluate.models import pad_token
    from posenc.hf.apply import apply

    torch.manual_seed(seed)
    with loaded.threads(), apply(loaded.model, config), torch.no_grad():
        out: Tensor = loaded.model.generate(
            prompt_tokens,
            attention_mask=torch.ones_like(prompt_tokens),
            pad_token_id=pad_token(loaded.model),
            **options,
        )
    return out[0, prompt_tokens.shape[1] :]
