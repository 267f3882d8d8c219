"""Train, export and evaluate the tiny Llama model that posenc ships, or its Qwen-shaped sibling.

    python -m training.train_tiny                  train, export to posenc/models/tiny, evaluate
    python -m training.train_tiny --shape qwen3    the same for the sibling, benchmarks/models/tiny-qwen3
    python -m training.train_tiny --evaluate       evaluate the exported model

Run it from the repository's root. Training regularly writes a checkpoint to the work folder and
resumes from it when it is started again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from training.evaluation import evaluate
from training.recipe import Recipe, Tokens, make_batch
from training.texts import Text, TextsError, fetch, held_out_texts, training_texts

SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"
VOCABULARY = 512
RECORD = "training.json"
ROOT = Path(__file__).resolve().parent.parent
_LOG_EVERY, _SAVE_EVERY = 50, 250

TinyModel = LlamaForCausalLM | Qwen3ForCausalLM
OUT = {"llama": ROOT / "posenc/models/tiny", "qwen3": ROOT / "benchmarks/models/tiny-qwen3"}
"""The shapes that can be trained, and the folder that each is exported to."""


class TrainingError(Exception):
    """The command cannot be run."""


@dataclass
class Progress:
    """The state of a run, all of which is in the checkpoint."""

    model: TinyModel
    optimizer: torch.optim.AdamW
    step: int = 0
    minutes: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)


def train_tokenizer(texts: list[Text]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that is lossless on any text and adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document for text in texts for document in text.documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: Text) -> Tokens:
    """Return the tokens of a text, with a separator after each of its documents."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(text.documents))
    end = [tokenizer.convert_tokens_to_ids(SEPARATOR)]
    return np.concatenate([np.array(one.ids + end, dtype=np.int64) for one in encoded])


def build_model(shape: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> TinyModel:
    """Build the untrained model, with untied embeddings because the model does not learn to copy with tied ones.

    The Qwen shape differs in everything that may shift the best parameters: it is narrower, normalizes queries
    and keys, and has another grouping of heads and another theta.
    """
    torch.manual_seed(recipe.seed)
    theta = 100000.0 if shape == "qwen3" else 10000.0
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": recipe.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(hidden_size=96, intermediate_size=256, num_key_value_heads=1, **common))
    return LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=352, num_key_value_heads=2, **common))


def start(shape: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, checkpoint: Path) -> Progress:
    """Return a new run, or the one saved in `checkpoint`."""
    model = build_model(shape, recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    progress = Progress(model, optimizer)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress.step, progress.minutes, progress.losses = saved["step"], saved["minutes"], saved["losses"]
    return progress


def train(recipe: Recipe, progress: Progress, stream: Tokens, random_ids: Tokens, checkpoint: Path) -> None:
    """Run the remaining steps, logging the loss and saving checkpoints."""
    model, optimizer = progress.model, progress.optimizer
    model.train()
    began, before = time.perf_counter(), progress.minutes
    recent: list[float] = []
    for step in range(progress.step, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate(step)
        inputs, labels = (torch.from_numpy(part) for part in make_batch(recipe, step, stream, random_ids))
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        recent.append(loss.item())
        progress.step = step + 1
        progress.minutes = before + (time.perf_counter() - began) / 60
        if progress.step % _LOG_EVERY == 0:
            progress.losses[progress.step] = average = round(float(np.mean(recent)), 4)
            recent.clear()
            print(f"step {progress.step} loss {average:.4f} minutes {progress.minutes:.1f}", flush=True)
        if progress.step % _SAVE_EVERY == 0 or progress.step == recipe.steps:
            save(progress, checkpoint)


def save(progress: Progress, checkpoint: Path) -> None:
    """Write the checkpoint; an interrupted write leaves the older one in place."""
    unfinished = checkpoint.with_suffix(".unfinished")
    torch.save(
        {
            "model": progress.model.state_dict(),
            "optimizer": progress.optimizer.state_dict(),
            "step": progress.step,
            "minutes": progress.minutes,
            "losses": progress.losses,
        },
        unfinished,
    )
    unfinished.replace(checkpoint)


def export(progress: Progress, tokenizer: PreTrainedTokenizerFast, entries: dict[str, Any], out: Path) -> None:
    """Write model, tokenizer and training record to `out`, replacing an earlier export.

    Parameters
    ----------
    progress
        The run whose model is written.
    tokenizer
        The model's tokenizer.
    entries
        The training record.
    out
        The folder to write; it is refused if it exists and is not an earlier export.
    """
    if out.exists() and not (out / RECORD).exists():
        raise TrainingError(f"{out} is not a folder exported before: name another one")
    building = out.with_name(out.name + ".unfinished")
    shutil.rmtree(building, ignore_errors=True)
    progress.model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    write_record(building, entries)
    for file in building.iterdir():
        # The weights are written readable by their owner only, and packaging would keep this mode.
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def record(shape: str, recipe: Recipe, progress: Progress, texts: list[Text], counts: dict[str, int]) -> dict[str, Any]:
    """Return everything needed to reproduce the model, and how the training went."""
    stages = [str(stage.steps) for stage in recipe.stages]
    return {
        "command": shlex.join(["python", "-m", "training.train_tiny", "--shape", shape, "--steps", *stages]),
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "texts": [{**text.record(), "tokens": counts[text.name]} for text in texts],
        "parameters": progress.model.num_parameters(),
        "steps": progress.step,
        "trained_tokens": progress.step * recipe.batch * recipe.context,
        "minutes": round(progress.minutes, 1),
        "losses": progress.losses,
    }


def write_record(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to the training record in `folder`."""
    path = folder / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(known | entries, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    stages = [stage.steps for stage in Recipe().stages]
    parser = argparse.ArgumentParser(prog="python -m training.train_tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--texts", type=Path, help="folder with the unpacked packages (default: fetch them)")
    parser.add_argument("--shape", choices=OUT, default="llama", help="the model's architecture and size")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint (default: .cache/tiny-SHAPE)")
    parser.add_argument("--out", type=Path, help="folder of the model (default: the shape's own)")
    parser.add_argument("--steps", type=int, nargs=len(stages), default=stages, help="steps of each stage")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--evaluate", action="store_true", help="only evaluate the model in the out folder")
    what.add_argument("--export", action="store_true", help="only export the checkpoint as it is, and evaluate it")
    options = parser.parse_args(arguments)
    options.work = options.work or ROOT / f".cache/tiny-{options.shape}"
    options.out = options.out or OUT[options.shape]
    return options


def run(options: argparse.Namespace) -> None:
    """Run what the command line requests."""
    torch.set_num_threads(options.threads)
    folder = options.texts or fetch(ROOT / ".cache/texts")
    if not options.evaluate:
        _train_and_export(options, folder)
    elif not (options.out / RECORD).exists():
        raise TrainingError(f"there is no model in {options.out}: train first")
    write_record(options.out, {"evaluation": evaluate(options.out, held_out_texts(folder))})


def _train_and_export(options: argparse.Namespace, folder: Path) -> None:
    checkpoint = options.work / "checkpoint.pt"
    if options.export and not checkpoint.exists():
        raise TrainingError(f"there is no checkpoint in {options.work}: train first")
    options.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe()
    stages = zip(recipe.stages, options.steps, strict=True)
    recipe = replace(recipe, stages=tuple(replace(stage, steps=steps) for stage, steps in stages))
    texts = training_texts(folder)
    tokenizer = train_tokenizer(texts)
    parts = {text.name: encode(tokenizer, text) for text in texts}
    progress = start(options.shape, recipe, tokenizer, checkpoint)
    if not options.export:
        random_ids = np.setdiff1d(np.arange(VOCABULARY), tokenizer.all_special_ids)
        train(recipe, progress, np.concatenate(list(parts.values())), random_ids, checkpoint)
    counts = {name: len(part) for name, part in parts.items()}
    export(progress, tokenizer, record(options.shape, recipe, progress, texts, counts), options.out)


def main() -> int:
    """Run the command; a failure prints one line."""
    try:
        run(parse())
    except (TextsError, TrainingError, OSError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
