"""The whole calibration: sweep, fit, report on other texts, write the file."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posenc.calibration.file import Calibration, CalibrationSettings, Choice, LossScore, ModelRecord, Texts
from posenc.errors import InvalidInputError
from posenc.evaluate.calibrate import curve
from posenc.evaluate.calibrate.corpus import Corpus, check_apart, draw
from posenc.evaluate.calibrate.losses import DocumentLosses
from posenc.evaluate.calibrate.search import Candidate, candidates
from posenc.evaluate.calibrate.sweep import STOPPING, Sweep, sweep
from posenc.evaluate.models import Loaded
from posenc.evaluate.scores import Mean
from posenc.evaluate.tasks.perplexity import check_lengths
from posenc.hf.fingerprint import fingerprint
from posenc.params import Fingerprint
from posenc.positions import IdentityStrategy
from posenc.trace import versions

NATIVE = IdentityStrategy.name
FITTED = "lampe"
"""The strategy whose mapping length is a function of the input's length."""
CELLS = "cells"
logger = logging.getLogger("posenc")


@dataclass(frozen=True)
class Asked:
    """What to calibrate.

    Parameters
    ----------
    strategies : sequence of str
        Names; every one is tried with the candidates it declares.
    texts, report_texts : sequence of str
        Sources of the documents that choose, and of those that report.
    lengths : sequence of int
        Input lengths in tokens.
    documents, scored : int
        Most documents, and tokens scored at the end of each.
    seed : int
        Of the documents' order and of the resampling.
    command : str
        Written into the file.
    """

    strategies: Sequence[str]
    texts: Sequence[str]
    report_texts: Sequence[str]
    lengths: Sequence[int]
    documents: int
    scored: int
    seed: int
    command: str


@dataclass(frozen=True)
class Job:
    """A calibration that is checked and ready to run: every candidate and every document is known.

    Parameters
    ----------
    grids : dict
        Candidates by strategy and length.
    """

    asked: Asked
    loaded: Loaded
    fingerprint: Fingerprint
    grids: dict[str, dict[int, list[Candidate]]]
    corpus: Corpus
    report: Corpus | None

    @property
    def lengths(self) -> list[int]:
        """Input lengths, shortest first."""
        return sorted(self.asked.lengths)

    @property
    def window(self) -> int:
        """Pretraining window in tokens."""
        return self.fingerprint.window

    @property
    def tokens(self) -> int:
        """Tokens to read at most: nothing dropped, nothing known."""
        documents = len(self.corpus.documents)
        reported = 0 if self.report is None else len(self.report.documents)
        fitted = FITTED in self.grids
        total = 0
        for length in self.lengths:
            tried = 1 + sum(len(grid[length]) for grid in self.grids.values())
            total += length * (documents * (tried + fitted) + reported * (1 + len(self.grids) + fitted))
        return total


@dataclass(frozen=True)
class Outcome:
    """What a calibration found: the file's content, every point it was chosen from, and what was reported.

    Parameters
    ----------
    reported : dict
        Losses of the report documents by length and label: ``native``, each strategy, ``lampe (curve)``.
    """

    calibration: Calibration
    sweeps: dict[str, dict[int, Sweep]]
    reported: dict[int, dict[str, Mean]]


def prepare(loaded: Loaded, asked: Asked) -> Job:
    """Check everything that can be checked before minutes are spent.

    Raises
    ------
    PosencError
        If a strategy cannot be calibrated, a text is too short, the tokenizer does not match, or the
        model cannot be served.
    """
    from posenc.hf.apply import apply, find_adapter

    check_lengths(asked.lengths, asked.scored)
    found = fingerprint(loaded.model, find_adapter(loaded.model))
    grids = {
        name: {length: candidates(name, found.window, length) for length in sorted(asked.lengths)}
        for name in asked.strategies
    }
    apply(loaded.model, IdentityStrategy()).remove()  # a model that posenc cannot serve is refused now
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])

    def drawn(sources: Sequence[str]) -> Corpus:
        return draw(
            loaded,
            sources,
            length=max(asked.lengths),
            count=asked.documents,
            scored=asked.scored,
            seed=asked.seed,
            vocabulary=vocabulary,
        )

    corpus = drawn(asked.texts)
    report = drawn(asked.report_texts) if asked.report_texts else None
    if report is not None:
        check_apart(corpus, report)
    for which in (corpus, report):
        if which is not None and len(which.documents) < 2:
            names = ", ".join(text.name for text in which.texts)
            raise InvalidInputError(
                f"{names}: only one document of {max(asked.lengths)} tokens fits, which leaves no error to compare "
                "with. Give a longer text or shorter lengths."
            )
    return Job(asked, loaded, found, grids, corpus, report)


def estimate_seconds(job: Job) -> float:
    """Time of the whole job at most, from one document of each length read without a strategy."""
    import torch

    seconds = 0.0
    with job.loaded.threads(), torch.inference_mode():
        for length in job.lengths:
            tokens = torch.from_numpy(job.corpus.documents[0, -length:].copy()).to(job.loaded.model.device)
            began = time.perf_counter()
            keep = job.asked.scored + 1
            out = job.loaded.model(input_ids=tokens[None], use_cache=False, logits_to_keep=keep)
            out.logits.cpu()  # waits for a GPU
            tried = 1 + sum(len(grid[length]) for grid in job.grids.values())
            seconds += (time.perf_counter() - began) * len(job.corpus.documents) * tried
    return seconds


def run(job: Job, folder: Path, step: Callable[[str, int], None] = lambda description, tokens: None) -> Outcome:
    """Calibrate; a run that was killed goes on where it stopped.

    Parameters
    ----------
    folder : Path
        An existing folder; cells are kept in a folder inside it.
    step : callable
        Called with a description and a number of tokens that are done.
    """
    choosing = _losses(job, job.corpus, folder, step)
    native = _native(job, choosing)
    if native[min(native)].mean > math.log(job.fingerprint.vocabulary or math.inf):
        logger.warning(
            "%s guesses worse than at random on %s (%.2f nats per token): does the tokenizer belong to the model?",
            job.loaded.name,
            ", ".join(text.name for text in job.corpus.texts),
            native[min(native)].mean,
        )
    sweeps = {
        name: {length: sweep(choosing, grid[length], length) for length in job.lengths}
        for name, grid in job.grids.items()
    }
    reporting = None if job.report is None else _losses(job, job.report, folder, step)
    reported: dict[int, dict[str, Mean]] = {}
    if reporting is not None:
        reported = {length: {"native": losses} for length, losses in _native(job, reporting).items()}

    def choice(label: str, candidate: Candidate, length: int, tried: int, losses: Mean) -> Choice:
        report = None
        if reporting is not None:
            own = reporting.of(candidate, length, len(reporting.corpus.documents))
            reported[length][label] = own
            report = score_of(own, reported[length]["native"])
        return Choice(params=candidate.params, tried=tried, calibration=score_of(losses, native[length]), report=report)

    strategies = {
        name: {
            length: choice(name, found.best.candidate, length, len(found.points), found.best.losses)
            for length, found in by_length.items()
        }
        for name, by_length in sweeps.items()
    }
    fit = _fit(job, sweeps)
    fitted = {}
    if fit is not None:
        for length in job.lengths:
            mapped = {"head": fit.head, "tail": fit.tail, "mapping": fit.mapping}
            candidate = Candidate(FITTED, mapped, job.window)
            losses = choosing.of(candidate, length, len(job.corpus.documents))
            fitted[length] = choice(f"{FITTED} (curve)", candidate, length, 1, losses)
    calibration = Calibration(
        command=job.asked.command,
        model=ModelRecord(name=job.loaded.name, fingerprint=job.fingerprint),
        texts=Texts(calibration=job.corpus.texts, report=() if job.report is None else job.report.texts),
        settings=CalibrationSettings(
            lengths=tuple(job.lengths),
            scored_tokens=job.asked.scored,
            documents=len(job.corpus.documents),
            seed=job.asked.seed,
            stopping=STOPPING,
            dtype=job.loaded.dtype,
        ),
        versions=versions(),
        mapping=None if fit is None else fit.mapping,
        head=None if fit is None else fit.head,
        tail=None if fit is None else fit.tail,
        confidence=None if fit is None else fit.confidence,
        fitted=fitted,
        native={length: score_of(losses, losses) for length, losses in native.items()},
        native_report={length: score_of(own["native"], own["native"]) for length, own in reported.items()},
        strategies=strategies,
    )
    return Outcome(calibration, sweeps, reported)


def _losses(job: Job, corpus: Corpus, folder: Path, step: Callable[[str, int], None]) -> DocumentLosses:
    return DocumentLosses(job.loaded, job.fingerprint, corpus, job.asked.scored, folder / CELLS, step)


def _native(job: Job, losses: DocumentLosses) -> dict[int, Mean]:
    candidate = Candidate(NATIVE, {}, job.window)
    return {length: losses.of(candidate, length, len(losses.corpus.documents)) for length in job.lengths}


def _fit(job: Job, sweeps: dict[str, dict[int, Sweep]]) -> curve.Fit | None:
    """Fit on the lengths beyond the window: inside it nothing needs to be compressed."""
    if FITTED not in sweeps:
        return None
    beyond = [found for length, found in sorted(sweeps[FITTED].items()) if length > job.window]
    return curve.fit_curve(beyond or list(sweeps[FITTED].values()), job.window, seed=job.asked.seed)


def score_of(losses: Mean, native: Mean) -> LossScore:
    """Summarize the losses of the same documents; four decimals, far below their errors."""
    gap = losses.minus(native)
    return LossScore(
        loss=round(losses.mean, 4),
        standard_error=_known(losses.standard_error),
        over_native=round(gap.mean, 4),
        over_native_error=_known(gap.standard_error),
        documents=len(losses.values),
    )


def _known(error: float) -> float | None:
    return None if math.isnan(error) else round(error, 4)
