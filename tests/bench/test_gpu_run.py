"""A run of ``scripts.gpu`` with backends that are wrong, crash or hang loses only their results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from posenc.bench import collect, lines, machine, results
from scripts import gpu
from scripts.gpu_site import ROOT
from tests.bench import made_up

SMALL = ("--device", "cpu", "--smoke")
RUN = """
import sys
from posenc.bench.results import Check
from scripts import gpu, gpu_tests
gpu_tests.check = lambda names, *rest: [Check(backend=name, passed=1, failed=0, skipped=0) for name in names]
sys.exit(gpu.main(sys.argv[1:]))
"""
"""The test suite is skipped here; it is tested separately."""


@dataclass(frozen=True)
class Ran:
    """The files and the output of a run."""

    status: int
    result: results.Result
    page: str
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run once with a correct backend, a wrong one and one that crashes."""
    root = tmp_path_factory.mktemp("gpu")
    made_up.install(root / "site")
    names = [word for name in ("cpu_flash", "unwritten", "crashing", "absent") for word in ("--backend", name)]
    folders = ("--folder", str(root / "lines"), "--out", str(root / "results"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, *SMALL, *names, *folders],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(root / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (root / "results").exists(), done.stderr
    (file,) = (root / "results").glob("*.json")
    page = (root / "results" / "performance.md").read_text()
    return Ran(done.returncode, results.read(file), page, done.stdout, root / "lines")


def test_a_crash_loses_only_the_row_of_its_case(ran: Ran):
    measured = {(row.kind, row.cache, row.backend, row.length) for row in ran.result.rows}
    kinds = (("attention", "rotated"), ("query", "raw"), ("query", "rotated"))
    expected = {(*kind, name, length) for kind in kinds for name in ("cpu_flash", "crashing") for length in (64, 128)}
    assert measured == expected - {("attention", "rotated", "crashing", 128)}
    (line,) = (text for text in ran.result.left_out if text.startswith("crashing"))
    assert line.startswith("crashing: the process ended (SIGABRT)")


def test_a_backend_that_leaves_output_unwritten_is_not_timed(ran: Ran):
    (check,) = (c for c in ran.result.checks if (c.backend, c.kind) == ("unwritten", "canary"))
    assert check.failed
    assert "output off by inf" in str(check.problem)
    (line,) = (text for text in ran.result.left_out if text.startswith("unwritten"))
    assert line.startswith("unwritten: 6 cases: its canary failed (")
    assert ran.status == 1


def test_the_other_backends_pass_their_canary_and_tests(ran: Ran):
    good = {(check.backend, check.kind) for check in ran.result.checks if check.good}
    assert {name for name, kind in good if kind == "canary"} == {"cpu_flash", "crashing"}
    assert {name for name, kind in good if kind == "tests"} == {"cpu_flash", "crashing", "unwritten"}
    assert "absent: no backend of that name is registered" in ran.result.left_out
    backends = " ".join(f"--backend {name}" for name in ("cpu_flash", "unwritten", "crashing", "absent"))
    assert ran.result.command == f"python3 -m scripts.gpu --device cpu --smoke {backends}"


def test_every_row_has_its_baselines(ran: Ran):
    for row in ran.result.rows:
        assert set(row.baselines) == {"flash"}
        assert len(row.baselines["flash"]) == len(row.plain) == 3
        assert "No viable backend" in row.refused["cudnn"]
    assert "| over flash alone |" in ran.page
    assert "- `cudnn` alone could not run every case: No viable backend" in ran.page
    assert "- `unwritten`, canary: " in ran.page


def test_the_output_ends_with_one_short_table(ran: Ran):
    title, head, *body = ran.printed.rstrip().splitlines()[-8:]
    assert title.startswith("time over flash attention alone")
    assert head.split() == ["kind", "shape", "strategy", "backend", "64", "128", "goal", "cudnn"]
    assert body[-1].split()[:3] == ["query", "4/2x16", "lampe"]
    assert len({line.split()[-1] for line in body}) > 1  # numbers
    assert ran.printed.count("not measured: ") == 3


def test_the_lines_give_the_same_result_again(ran: Ran, tmp_path: Path, capsys):
    assert gpu.main([*SMALL, "--collect", str(ran.folder), "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*.json")
    assert results.read(file) == ran.result
    assert "written: " in capsys.readouterr().out


def test_rows_measured_before_a_kill_are_a_result(ran: Ran, tmp_path: Path):
    lines_of_it = (ran.folder / collect.FILE).read_text().splitlines(keepends=True)
    rows = [number for number, line in enumerate(lines_of_it) if '"row"' in line]
    killed = [*lines_of_it[: rows[2]], lines_of_it[rows[2]][:50]]  # while writing the third
    (tmp_path / collect.FILE).write_text("".join(killed))
    result = collect.collect(tmp_path)
    assert result.rows == ran.result.rows[:2]
    assert collect.CUT_SHORT in result.left_out
    assert collect.CUT_SHORT not in ran.result.left_out


def test_rows_measured_before_sigterm_are_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made_up.install(tmp_path / "site")
    facts = {**machine.describe(), "load_before": None}
    check = {"backend": "hanging", "kind": "canary", "passed": 1, "failed": 0, "skipped": 0}
    (tmp_path / "lines").mkdir()
    for entry in ({"facts": facts}, {"check": check}):
        lines.append(tmp_path / "lines" / collect.FILE, entry)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    folders = ("--folder", str(tmp_path / "lines"), "--out", str(tmp_path / "results"))
    options = ("--only", "times", "--backend", "hanging", *folders)
    process = subprocess.Popen([sys.executable, "-m", "scripts.gpu", *SMALL, *options], cwd=ROOT)
    ends = time.monotonic() + 120
    while not collect.rows(tmp_path / "lines"):
        assert process.poll() is None, "it ended before it measured"
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    (file,) = (tmp_path / "results").glob("*.json")
    result = results.read(file)
    assert [(row.backend, row.length) for row in result.rows] == [("hanging", 64)]
    assert collect.CUT_SHORT in result.left_out


def test_the_checkout_comes_before_the_wheel_made_of_it(tmp_path: Path) -> None:
    """Also if the checkout is on the path already, as it is under ``python3 -m``."""
    code = f"""
import sys
from pathlib import Path
from scripts import gpu_site
gpu_site.SITE = Path({str(tmp_path)!r})
gpu_site.prepare()
gpu_site.prepare()
print(*sys.path, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    paths = done.stdout.splitlines()
    assert paths.index(str(ROOT)) < paths.index(str(tmp_path)), done.stderr
    assert paths.count(str(tmp_path)) == 1
