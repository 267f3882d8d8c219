"""A whole calibration: sweep the candidates, fit LaMPE's curve, and report the choices on other texts."""

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
from posenc.evaluate.calibrate.sweep import STOPPING, CandidateSweep, sweep
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import Mean
from posenc.evaluate.tasks.prose import check_lengths
from posenc.hf.fingerprint import fingerprint
from posenc.params import Fingerprint
from posenc.positions import IdentityStrategy
from posenc.trace import versions

NATIVE = IdentityStrategy.name
FITTED = "lampe"
"""The strategy whose mapping length is a function of the input's length."""
CELLS = "cells"
Step = Callable[[str, int], None]
"""Called with a description and a number of tokens that are done."""
logger = logging.getLogger("posenc")


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate.

    Parameters
    ----------
    strategies : sequence of str
        Names; every strategy is tried with the candidates that it declares.
    texts, report_texts : sequence of str
        Texts that the choice is made on, and texts that it is reported on.
    lengths : sequence of int
        Input lengths in tokens.
    documents, scored : int
        Most documents, and tokens scored at the end of each.
    seed : int
        Of the order of the documents and of the resampling.
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
class CalibrationJob:
    """A calibration that is checked and ready to run.

    Parameters
    ----------
    grids : dict
        Candidates by strategy and length.
    corpus : Corpus
        Documents that the choice is made on.
    report : Corpus, optional
        Documents that it is reported on.
    """

    options: CalibrationOptions
    loaded: Loaded
    fingerprint: Fingerprint
    grids: dict[str, dict[int, list[Candidate]]]
    corpus: Corpus
    report: Corpus | None

    @property
    def lengths(self) -> list[int]:
        """Input lengths, shortest first."""
        return sorted(self.options.lengths)

    @property
    def window(self) -> int:
        """Pretraining window in tokens."""
        return self.fingerprint.window

    @property
    def tokens(self) -> int:
        """Tokens to read if no candidate is dropped and no loss is measured yet."""
        documents = len(self.corpus.documents)
        reported = 0 if self.report is None else len(self.report.documents)
        fitted = FITTED in self.grids
        total = 0
        for length in self.lengths:
            tried = 1 + sum(len(grid[length]) for grid in self.grids.values())
            total += length * (documents * (tried + fitted) + reported * (1 + len(self.grids) + fitted))
        return total


@dataclass(frozen=True)
class CalibrationOutcome:
    """The content of the file, and everything that it was made from.

    Parameters
    ----------
    sweeps : dict
        Candidates by strategy and length.
    reported : dict
        Losses of the report documents by length and label: ``native``, each strategy, ``lampe (curve)``.
    """

    calibration: Calibration
    sweeps: dict[str, dict[int, CandidateSweep]]
    reported: dict[int, dict[str, Mean]]


def prepare(loaded: Loaded, options: CalibrationOptions) -> CalibrationJob:
    """Check everything that can be checked before measuring.

    Raises
    ------
    PosencError
        If a strategy cannot be calibrated, a text is too short, the tokenizer does not match, or the
        model cannot be served.
    """
    from posenc.hf.apply import apply, find_adapter

    check_lengths(options.lengths, options.scored)
    model = fingerprint(loaded.model, find_adapter(loaded.model))
    grids = {
        name: {length: candidates(name, model.window, length) for length in sorted(options.lengths)}
        for name in options.strategies
    }
    apply(loaded.model, IdentityStrategy()).remove()  # a model that posenc cannot serve is refused now
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])

    def documents(sources: Sequence[str]) -> Corpus:
        return draw(
            loaded,
            sources,
            length=max(options.lengths),
            count=options.documents,
            scored=options.scored,
            seed=options.seed,
            vocabulary=vocabulary,
        )

    corpus = documents(options.texts)
    report = documents(options.report_texts) if options.report_texts else None
    if report is not None:
        check_apart(corpus, report)
    for drawn in (corpus, report):
        if drawn is not None and len(drawn.documents) < 2:
            names = ", ".join(text.name for text in drawn.texts)
            raise InvalidInputError(
                f"{names}: only one document of {max(options.lengths)} tokens fits, which leaves no error to compare "
                "with. Give a longer text or shorter lengths."
            )
    return CalibrationJob(options, loaded, model, grids, corpus, report)


def estimate_seconds(job: CalibrationJob) -> float:
    """Upper bound on the time of a job, from one document of each length read without a strategy."""
    import torch

    seconds = 0.0
    with job.loaded.threads(), torch.inference_mode():
        for length in job.lengths:
            tokens = torch.from_numpy(job.corpus.documents[0, -length:].copy()).to(job.loaded.model.device)
            began = time.perf_counter()
            keep = job.options.scored + 1
            out = job.loaded.model(input_ids=tokens[None], use_cache=False, logits_to_keep=keep)
            out.logits.cpu()  # waits for a GPU
            tried = 1 + sum(len(grid[length]) for grid in job.grids.values())
            seconds += (time.perf_counter() - began) * len(job.corpus.documents) * tried
    return seconds


def run(job: CalibrationJob, folder: Path, step: Step = lambda description, tokens: None) -> CalibrationOutcome:
    """Calibrate. A run that was killed continues where it stopped.

    Parameters
    ----------
    folder : Path
        An existing folder, in which the folder of the cells exists.
    step : callable
        Called with a description and a number of tokens that are done.

    Raises
    ------
    InvalidInputError
        If a cell is damaged or cannot be written, or a loss is not finite.
    """
    losses = _losses(job, job.corpus, folder, step)
    native = _native(job, losses)
    _warn_below_chance(job, native)
    sweeps = {
        name: {length: sweep(losses, grid[length], length) for length in job.lengths}
        for name, grid in job.grids.items()
    }
    report = _Report(job, None if job.report is None else _losses(job, job.report, folder, step))

    def choice(label: str, candidate: Candidate, length: int, tried: int, mean: Mean) -> Choice:
        return Choice(
            params=candidate.params,
            tried=tried,
            calibration=score_of(mean, native[length]),
            report=report.score(label, candidate, length),
        )

    strategies = {
        name: {
            length: choice(name, scored.best.candidate, length, len(scored.points), scored.best.losses)
            for length, scored in by_length.items()
        }
        for name, by_length in sweeps.items()
    }
    fit = _fit(job, sweeps)
    fitted = {}
    if fit is not None:
        candidate = Candidate(FITTED, {"head": fit.head, "tail": fit.tail, "mapping": fit.mapping}, job.window)
        for length in job.lengths:
            mean = losses.of(candidate, length, len(job.corpus.documents))
            fitted[length] = choice(f"{FITTED} (curve)", candidate, length, 1, mean)
    calibration = Calibration(
        command=job.options.command,
        model=ModelRecord(name=job.loaded.name, fingerprint=job.fingerprint),
        texts=Texts(calibration=job.corpus.texts, report=() if job.report is None else job.report.texts),
        settings=CalibrationSettings(
            lengths=tuple(job.lengths),
            scored_tokens=job.options.scored,
            documents=len(job.corpus.documents),
            seed=job.options.seed,
            stopping=STOPPING,
            dtype=job.loaded.dtype,
        ),
        versions=versions(),
        mapping=None if fit is None else fit.mapping,
        head=None if fit is None else fit.head,
        tail=None if fit is None else fit.tail,
        confidence=None if fit is None else fit.confidence,
        fitted=fitted,
        native={length: score_of(mean, mean) for length, mean in native.items()},
        native_report={length: score_of(means["native"], means["native"]) for length, means in report.losses.items()},
        strategies=strategies,
    )
    return CalibrationOutcome(calibration, sweeps, report.losses)


class _Report:
    """Losses of the report documents by length and label, and the scores of the choices on them.

    Parameters
    ----------
    measured : DocumentLosses, optional
        None without report texts: there are no scores then.
    """

    def __init__(self, job: CalibrationJob, measured: DocumentLosses | None) -> None:
        self._measured = measured
        native = {} if measured is None else _native(job, measured)
        self.losses: dict[int, dict[str, Mean]] = {length: {"native": mean} for length, mean in native.items()}

    def score(self, label: str, candidate: Candidate, length: int) -> LossScore | None:
        """Measure a choice on the report documents."""
        if self._measured is None:
            return None
        mean = self._measured.of(candidate, length, len(self._measured.corpus.documents))
        self.losses[length][label] = mean
        return score_of(mean, self.losses[length]["native"])


def _losses(job: CalibrationJob, corpus: Corpus, folder: Path, step: Step) -> DocumentLosses:
    return DocumentLosses(job.loaded, job.fingerprint, corpus, job.options.scored, folder / CELLS, step)


def _native(job: CalibrationJob, losses: DocumentLosses) -> dict[int, Mean]:
    """The model without any strategy, by length."""
    candidate = Candidate(NATIVE, {}, job.window)
    return {length: losses.of(candidate, length, len(losses.corpus.documents)) for length in job.lengths}


def _warn_below_chance(job: CalibrationJob, native: dict[int, Mean]) -> None:
    shortest = native[min(native)].mean
    if shortest > math.log(job.fingerprint.vocabulary or math.inf):
        logger.warning(
            "%s guesses worse than at random on %s (%.2f nats per token): does the tokenizer belong to the model?",
            job.loaded.name,
            ", ".join(text.name for text in job.corpus.texts),
            shortest,
        )


def _fit(job: CalibrationJob, sweeps: dict[str, dict[int, CandidateSweep]]) -> curve.Fit | None:
    """Fit the curve on the lengths beyond the window: inside it nothing needs to be compressed."""
    if FITTED not in sweeps:
        return None
    beyond = [scored for length, scored in sorted(sweeps[FITTED].items()) if length > job.window]
    return curve.fit_curve(beyond or list(sweeps[FITTED].values()), job.window, seed=job.options.seed)


def score_of(losses: Mean, native: Mean) -> LossScore:
    """Summarize the losses of the same documents; four decimals, far finer than their errors."""
    gap = losses.minus(native)
    return LossScore(
        loss=round(losses.mean, 4),
        standard_error=_rounded(losses.standard_error),
        over_native=round(gap.mean, 4),
        over_native_error=_rounded(gap.standard_error),
        documents=len(losses.values),
    )


def _rounded(error: float) -> float | None:
    return None if math.isnan(error) else round(error, 4)
