"""The GitHub workflow runs what .ci/run runs, on the Python versions that the package names."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import yaml

from scripts.environments import ROOT
from tests.packaging.test_project import PROJECT

WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))


def runs(job: dict[str, Any]) -> list[str]:
    """The commands of a job, once for every combination of its matrix."""
    axes: dict[str, list[str]] = job["strategy"]["matrix"]
    lines = [step["run"] for step in job["steps"] if "run" in step]
    return [
        re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name: values[name[1]], line)  # noqa: B023
        for values in (dict(zip(axes, point, strict=True)) for point in product(*axes.values()))
        for line in lines
    ]


def made(lines: list[str]) -> set[str]:
    return {line.removeprefix("make ") for line in lines if line.startswith("make ")}


def test_it_makes_targets_that_exist() -> None:
    called = [line for job in JOBS.values() for line in runs(job)]
    assert all(re.fullmatch(r"make [a-z0-9-]+|scripts/ci-packages\.sh", line) for line in called)
    assert made(called) <= TARGETS


def test_it_runs_what_runs_elsewhere() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert made([line for job in JOBS.values() for line in runs(job)]) == made(steps) | {"test-torch"}
    assert "scripts/ci-packages.sh" in runs(JOBS["test"])


def test_it_tests_every_python_that_the_package_names() -> None:
    named = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if re.search(r"Python :: \d\.", text)]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    (setup,) = (step for step in JOBS["check"]["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["with"]["python-version"] == named[0]


def test_it_may_only_read() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    assert set(WORKFLOW[True]) == {"push", "pull_request", "schedule", "workflow_dispatch"}  # YAML reads `on` as true
    for job in JOBS.values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
        used = [step for step in job["steps"] if "uses" in step]
        assert {step["uses"].split("/")[0] for step in used} == {"actions"}
        assert used[0]["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("target", re.findall(r"^([a-z0-9-]+):.* ## ", MAKEFILE, re.MULTILINE))
def test_targets_are_commands_not_files(target: str) -> None:
    phony = MAKEFILE.split("\n.PHONY:")[1].split("\n\n")[0].replace("\\\n", " ").split()
    assert target in phony


def test_the_fast_tests_are_there() -> None:
    (fast,) = re.findall(r"^FAST := (.+)$", MAKEFILE, re.MULTILINE)
    assert all((ROOT / path).exists() for path in fast.split())
    assert "$(FAST)" in MAKEFILE.split("\ntest-fast:")[1].split("\n\n")[0]
