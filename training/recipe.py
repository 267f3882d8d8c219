"""The training data of the tiny model, batch by batch.

A model learns retrieval only from data that requires it. Repeats in prose are too rare and too
easily guessed from the last few tokens, so the first stage consists only of random segments
that are repeated to fill the context. Text is mixed in once the model has learnt to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
IGNORED = -100
"""The label of a token that the loss ignores."""

_PLACING_ATTEMPTS = 50


@dataclass(frozen=True)
class Stage:
    """A stage of the training.

    Attributes
    ----------
    steps
        Its length in steps.
    tiled, planted
        The number of samples of each kind in a batch; the others are plain text.
    pairs
        The largest number of spans planted into a sample.
    """

    steps: int
    tiled: int
    planted: int = 0
    pairs: int = 0


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run; the defaults produced the shipped model.

    Attributes
    ----------
    seed
        Seeds the weights and, with the step number, every batch.
    stages
        First only copying, then text with more and more recall: if few spans are planted, a
        guess from the surrounding text too often wins over the copy.
    warmup_steps, decay_steps
        The learning rate rises linearly at the start and falls linearly to zero at the end.
    tiled_segment, planted_span
        The shortest and longest random segment to repeat, and random span to plant twice.
    """

    seed: int = 20
    batch: int = 16
    context: int = 256
    stages: tuple[Stage, ...] = (
        Stage(steps=1200, tiled=16),
        Stage(steps=2300, tiled=3, planted=5, pairs=3),
        Stage(steps=1000, tiled=2, planted=6, pairs=6),
        Stage(steps=4000, tiled=1, planted=12, pairs=6),
    )
    warmup_steps: int = 50
    decay_steps: int = 3000
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    tiled_segment: tuple[int, int] = (8, 64)
    planted_span: tuple[int, int] = (6, 24)

    @property
    def steps(self) -> int:
        """The total number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Return the stage that `step` belongs to."""
        ends = accumulate(stage.steps for stage in self.stages)
        return next(stage for stage, end in zip(self.stages, ends, strict=True) if step < end)

    def rate(self, step: int) -> float:
        """Return the factor by which the learning rate is multiplied at `step`."""
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps)


def make_batch(recipe: Recipe, step: int, stream: Tokens, random_ids: Tokens) -> tuple[Tokens, Tokens]:
    """Make the batch of one step, which depends only on the seed and the step.

    Parameters
    ----------
    recipe
        Kinds, sizes and seed.
    step
        The step's number, counted over all stages.
    stream
        The tokens of all training texts, concatenated.
    random_ids
        The tokens that random segments are drawn from.

    Returns
    -------
    tuple of arrays
        Inputs and labels, [batch, context]; labels are aligned with the inputs.
    """
    rng = np.random.default_rng([recipe.seed, step])
    stage = recipe.stage(step)
    samples = []
    for row in range(recipe.batch):
        if row < stage.tiled:
            samples.append(tiled(rng, recipe, random_ids))
            continue
        start = rng.integers(len(stream) - recipe.context)
        text = stream[start : start + recipe.context].copy()
        if row < stage.tiled + stage.planted:
            samples.append(planted(rng, recipe, stage.pairs, text, random_ids))
        else:
            samples.append((text, text))
    inputs, labels = zip(*samples, strict=True)
    return np.stack(inputs), np.stack(labels)


def tiled(rng: np.random.Generator, recipe: Recipe, random_ids: Tokens) -> tuple[Tokens, Tokens]:
    """Repeat a random segment until the context is full; only the repeats are trained on."""
    size = int(rng.integers(recipe.tiled_segment[0], recipe.tiled_segment[1] + 1))
    tokens = np.resize(rng.choice(random_ids, size), recipe.context)
    labels = tokens.copy()
    # Nothing indicates where the first repeat starts, so its first token cannot be predicted either.
    labels[: size + 1] = IGNORED
    return tokens, labels


def planted(
    rng: np.random.Generator, recipe: Recipe, pairs: int, text: Tokens, random_ids: Tokens
) -> tuple[Tokens, Tokens]:
    """Overwrite parts of `text` with up to `pairs` random spans, each planted twice at a random distance."""
    tokens, labels = text.copy(), text.copy()
    free = np.ones(len(text), dtype=bool)
    for _ in range(int(rng.integers(1, pairs + 1))):
        size = int(rng.integers(recipe.planted_span[0], recipe.planted_span[1] + 1))
        for _ in range(_PLACING_ATTEMPTS):
            distance = int(rng.integers(size, len(text) - size + 1))
            first = int(rng.integers(0, len(text) - size - distance + 1))
            second = first + distance
            if free[first : first + size].all() and free[second : second + size].all():
                break
        else:
            continue
        span = rng.choice(random_ids, size)
        for start in (first, second):
            tokens[start : start + size] = span
            free[start : start + size] = False
        labels[first : first + size] = IGNORED
        labels[second] = IGNORED
        labels[second + 1 : second + size] = span[1:]
    return tokens, labels
