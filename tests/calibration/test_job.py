"""Calibration: candidates see the same documents, bad ones are dropped, killed runs resume, bad input is an error."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import posenc
from posenc.calibration.candidates import BUDGET
from posenc.errors import InvalidConfigError, InvalidInputError, PluginError, UnknownNameError
from posenc.evaluate.calibrate import job as work
from posenc.evaluate.calibrate.corpus import draw, read_source
from posenc.evaluate.calibrate.job import score_of
from posenc.evaluate.calibrate.losses import DocumentLosses, plan_digest
from posenc.evaluate.calibrate.search import Candidate, candidates
from posenc.evaluate.calibrate.sweep import STOP_ERRORS, STOP_NATS, paired, rounds, survivors, sweep
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import Mean
from posenc.evaluate.tasks.prose import document_losses
from posenc.positions import PositionStrategy
from tests.calibration.conftest import WINDOW, make_text

Calibrated = tuple[work.CalibrationOutcome, Path]


def losses_of(job: work.CalibrationJob, folder: Path) -> DocumentLosses:
    (folder / work.CELLS).mkdir(exist_ok=True)
    return DocumentLosses(job.loaded, job.fingerprint, job.corpus, job.options.scored, folder / work.CELLS)


def test_a_cell_is_the_perplexity_of_the_same_documents(
    loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path
):
    job = work.prepare(loaded, options)
    losses = losses_of(job, tmp_path)
    candidate = Candidate("rerope", {"window_size": 7}, WINDOW)
    first = losses.of(candidate, 64, 5)
    with posenc.apply(loaded.model, "rerope", window_size=7):
        expected = tuple(document_losses(loaded.model, job.corpus.documents[:5], 64, options.scored))
    assert first.values == expected
    assert losses.of(candidate, 64, 9).values[:5] == first.values


def test_a_second_run_measures_nothing(
    calibrated: Calibrated, loaded: Loaded, options: work.CalibrationOptions, monkeypatch
):
    outcome, file = calibrated
    monkeypatch.setattr(DocumentLosses, "_measure", lambda *_: pytest.fail("a cell was measured again"))
    again = work.run(work.prepare(loaded, options), file.parent)
    assert again == outcome


def test_the_choice_is_the_lowest_mean_loss_and_is_reported_on_the_other_text(
    calibrated: Calibrated, options: work.CalibrationOptions
):
    outcome, _ = calibrated
    for name, by_length in outcome.calibration.strategies.items():
        for length, choice in by_length.items():
            swept = outcome.sweeps[name][length]
            whole = [point for point in swept.points if len(point.losses.values) == options.documents]
            lowest = min(whole, key=lambda point: point.losses.mean)
            assert choice.params == lowest.candidate.params
            assert choice.calibration.loss == pytest.approx(lowest.losses.mean, abs=1e-4)
            assert choice.tried == len(swept.points)
            assert choice.report is not None
            assert choice.report.documents == options.documents
            assert choice.report.loss != choice.calibration.loss
    names = [text.name for text in outcome.calibration.texts.calibration + outcome.calibration.texts.report]
    assert names == ["choose.txt", "report.txt"]


def test_all_candidates_are_scored_on_the_same_documents(loaded: Loaded, options: work.CalibrationOptions):
    one, two = (work.prepare(loaded, options).corpus for _ in range(2))
    np.testing.assert_array_equal(one.documents, two.documents)
    assert one.texts == two.texts
    other = work.prepare(loaded, replace(options, seed=1)).corpus
    assert sorted(map(tuple, other.documents)) == sorted(map(tuple, one.documents))
    assert other.sha256 != one.sha256


def test_equal_plans_share_a_cell(loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path):
    losses = losses_of(work.prepare(loaded, options), tmp_path)
    native = losses.key(Candidate("rope", {}, WINDOW), WINDOW)
    assert losses.key(Candidate("lampe", {"head": 4, "mapping": WINDOW}, WINDOW), WINDOW) == native
    assert losses.key(Candidate("self_extend", {"window_size": WINDOW}, WINDOW), WINDOW) == native
    assert losses.key(Candidate("lampe", {"head": 4, "mapping": 9}, WINDOW), WINDOW) != native
    assert losses.key(Candidate("yarn", {"factor": 2.0}, WINDOW), WINDOW) != native
    assert losses.key(Candidate("rope", {}, WINDOW), 2 * WINDOW) != native


def test_a_different_scale_or_frequency_changes_the_digest_of_a_plan():
    plain, scaled = (posenc.strategy("rerope", window=WINDOW, window_size=8, log_scale=on) for on in (False, True))
    assert plan_digest(plain, 64) != plan_digest(scaled, 64)
    assert len({plan_digest(posenc.strategy("yarn", window=32, factor=factor), 64) for factor in (1.0, 2.0, 3.0)}) == 3


def test_clearly_bad_candidates_are_dropped_by_the_stated_rule():
    documents = np.random.default_rng(0).normal(3, 1, 16)
    swing = np.tile([1.0, -1.0], 8)
    losses = {
        0: Mean(tuple(documents)),
        1: Mean(tuple(documents + 0.5 + 0.1 * swing)),  # much worse, with a small error
        2: Mean(tuple(documents + 0.5 + 2.0 * swing)),  # as much worse, but with a large error
        3: Mean(tuple(documents + 0.9 * STOP_NATS + 0.001 * swing)),  # slightly worse, with a small error
    }
    assert survivors(losses) == {0, 2, 3}
    gap = losses[1].minus(losses[0])
    assert gap.mean > STOP_ERRORS * gap.standard_error


def test_the_rounds_double_and_end_with_all_documents():
    assert rounds(48) == [8, 16, 32, 48]
    assert rounds(16) == [8, 16]
    assert rounds(5) == [5]


def test_a_dropped_candidate_is_not_scored_any_further(
    loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path, monkeypatch
):
    done: list[int] = []
    job = work.prepare(loaded, replace(options, documents=20))
    losses = replace(losses_of(job, tmp_path), step=lambda description, tokens: done.append(tokens))
    noise = np.random.default_rng(0).normal(0, 0.01, 20)

    def measure(losses: DocumentLosses, candidate: Candidate, length: int, start: int, stop: int) -> tuple[float, ...]:
        losses.skip(candidate, length, stop - start)
        return tuple((float(candidate.params["window_size"]) + noise)[start:stop])

    monkeypatch.setattr(DocumentLosses, "_measure", measure)
    grid = [Candidate("rerope", {"window_size": size}, WINDOW) for size in (3, 9, 20)]
    swept = sweep(losses, grid, 64)
    assert [len(point.losses.values) for point in swept.points] == [20, 8, 8]
    assert swept.best.candidate is grid[0]
    assert swept.dropped(swept.points[1])
    assert sum(done) == 3 * 20 * 64  # the progress bar reaches its end, dropped or not
    completed = swept.completed(list(swept.points))
    assert completed.shape == (3, 20)
    np.testing.assert_allclose(completed[1] - completed[0], 6, atol=0.05)


def test_gaps_are_paired_over_the_documents_that_both_have():
    assert paired(Mean((3.0, 4.0)), Mean((1.0, 1.0, 9.0))) == (2.0, 3.0)
    assert score_of(Mean((1.0, 2.0)), Mean((1.5, 2.5))).over_native == -0.5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_run_killed_at_any_moment_resumes_and_ends_the_same(
    calibrated: Calibrated, loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path
):
    outcome, file = calibrated
    cells = tmp_path / work.CELLS
    cells.mkdir()
    rng = np.random.default_rng(0)
    held = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            work.run(work.prepare(loaded, options), tmp_path)
            os._exit(0)
        time.sleep(float(rng.uniform(0.05, 0.4)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        held.append(len(list(cells.glob("[!.]*.json"))))
    assert held == sorted(held)  # no finished cell is lost
    assert work.run(work.prepare(loaded, options), tmp_path) == outcome
    names = {path.name for path in (file.parent / work.CELLS).glob("*.json")}
    assert {path.name for path in cells.glob("[!.]*.json")} == names


@pytest.mark.parametrize(
    "content", ["", "{", '{"losses": [1.0, null]}', '{"other": 1}', '{"losses": 3}', "[1]", "\xff"]
)
def test_a_damaged_cell_is_named(loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path, content: str):
    losses = losses_of(work.prepare(loaded, options), tmp_path)
    candidate = Candidate("rope", {}, WINDOW)
    losses.of(candidate, 32, 2)
    (file,) = losses.folder.glob("*.json")
    file.write_text(content, encoding="latin-1")
    with pytest.raises(
        InvalidInputError, match=r"(not a result of posenc calibrate \(not JSON\)|damaged result \(.*\))\. Remove it"
    ) as caught:
        losses_of(work.prepare(loaded, options), tmp_path).of(candidate, 32, 2)
    assert str(file) in str(caught.value)


def test_a_full_disk_loses_nothing(loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path, monkeypatch):
    losses = losses_of(work.prepare(loaded, options), tmp_path)
    candidate = Candidate("rope", {}, WINDOW)
    losses.of(candidate, 32, 2)
    (file,) = losses.folder.glob("*.json")
    before = file.read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(InvalidInputError, match=r"cannot be written \(No space left on device\)"):
            losses.of(candidate, 32, 4)
    assert [path.read_bytes() for path in losses.folder.iterdir()] == [before]
    assert len(json.loads(before)["losses"]) == 2


def test_a_loss_that_overflows_is_an_error(
    loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path, monkeypatch
):
    from posenc.evaluate.calibrate import losses as module

    losses = losses_of(work.prepare(loaded, options), tmp_path)
    monkeypatch.setattr(module, "document_losses", lambda *_: [float("nan")])
    with pytest.raises(InvalidInputError, match="not a finite number"):
        losses.of(Candidate("rope", {}, WINDOW), 32, 1)
    assert not list(losses.folder.iterdir())


def test_unusable_texts_are_refused(loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"choose.txt: the text has \d+ tokens, too short for an input of 9999"):
        work.prepare(loaded, replace(options, lengths=(64, 9999)))
    with pytest.raises(InvalidInputError, match="is both a calibration text and the report text"):
        work.prepare(loaded, replace(options, report_texts=options.texts))
    with pytest.raises(InvalidInputError, match="must be at least 9, the 8 scored tokens"):
        work.prepare(loaded, replace(options, lengths=(8,)))
    (tmp_path / "short.txt").write_text(make_text(5, 20))
    with pytest.raises(InvalidInputError, match="only one document of 110 tokens fits"):
        work.prepare(loaded, replace(options, texts=(str(tmp_path / "short.txt"),), lengths=(110,), scored=100))
    with pytest.raises(InvalidInputError, match=r"docstrings:nowhere: no package 'nowhere'"):
        read_source("docstrings:nowhere")
    with pytest.raises(InvalidInputError, match=r"no package '../x'"):
        read_source("docstrings:../x")


def test_a_tokenizer_that_does_not_match_the_model_is_refused(loaded: Loaded, options: work.CalibrationOptions):
    class Wide:
        def encode(self, text: str, **options: object) -> list[int]:
            return [ord(letter) for letter in text]

    with pytest.raises(
        InvalidInputError, match=r"the tokenizer does not match the model: it makes token 122 .* embeds 60"
    ):
        work.prepare(replace(loaded, tokenizer=Wide()), options)


def test_a_model_worse_than_chance_causes_a_warning(
    loaded: Loaded, options: work.CalibrationOptions, tmp_path: Path, caplog
):
    caplog.set_level("WARNING", logger="posenc")
    (tmp_path / work.CELLS).mkdir()
    work.run(work.prepare(loaded, replace(options, strategies=("ntk",), lengths=(32,), report_texts=())), tmp_path)
    assert "guesses worse than at random on choose.txt" in caplog.text  # its weights are random


def test_several_texts_contribute_equally(loaded: Loaded, texts: tuple[str, str]):
    both = draw(loaded, texts, length=64, count=7, scored=8, seed=0, vocabulary=60)
    assert both.documents.shape == (7, 64)
    alone = draw(loaded, texts[:1], length=64, count=4, scored=8, seed=0, vocabulary=60)
    assert {tuple(row) for row in alone.documents} < {tuple(row) for row in both.documents}


def test_docstrings_of_a_package_are_read_without_running_it(tmp_path: Path, monkeypatch):
    package = tmp_path / "some_package"
    (package / "tests").mkdir(parents=True)
    prose = "This sentence is long enough to count as prose, because it has more than eighty characters."
    (package / "__init__.py").write_text(f'"""{prose}"""\nimport this_does_not_exist\n\ndef f():\n    """Short."""\n')
    (package / "module.py").write_text(f'class A:\n    def g(self):\n        """Second. {prose}"""\n        return 1\n')
    (package / "broken.py").write_text("def (")
    (package / "tests" / "test_it.py").write_text(f'"""Not this. {prose}"""')
    monkeypatch.syspath_prepend(tmp_path)
    assert read_source("docstrings:some_package").content == f"{prose}\n\nSecond. {prose}\n"


@pytest.mark.parametrize("name", [n for n, i in posenc.strategies().items() if i.factory.calibration_grid(256, 512)])
@pytest.mark.parametrize("length", [100, 256, 1000, 16 * 256])
def test_every_declared_candidate_is_valid_distinct_and_in_budget(name: str, length: int):
    declared = candidates(name, 256, length)
    assert len(declared) <= BUDGET
    assert len({json.dumps(candidate.params, sort_keys=True) for candidate in declared}) == len(declared)
    reach = [candidate.strategy.plan(length).max_relative for candidate in declared]
    if posenc.strategies()[name].capabilities.bounded or name in ("self_extend", "leaky_rerope"):
        assert min(reach) < 256  # at least one candidate stays inside the window


def test_strategies_that_declare_no_or_too_many_candidates_are_refused(monkeypatch):
    with pytest.raises(InvalidConfigError, match=r"'rope' cannot be calibrated: .*These do: lampe, "):
        candidates("rope", 256, 512)
    with pytest.raises(UnknownNameError, match="Did you mean 'rerope'"):
        candidates("reropee", 256, 512)
    factory: type[PositionStrategy] = posenc.strategies()["rerope"].factory
    for grid, said in (
        ([{"window_size": size} for size in range(1, 99)], "declares 98 candidates"),
        ([{"window_size": -1}], "a candidate that it refuses: rerope.window_size"),
    ):
        monkeypatch.setattr(factory, "calibration_grid", classmethod(lambda cls, window, length, grid=grid: grid))
        with pytest.raises(PluginError, match=said):
            candidates("rerope", 256, 512)
