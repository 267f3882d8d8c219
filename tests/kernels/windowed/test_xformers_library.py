"""Finding xformers and the CUDA library that it is linked to."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from posenc.kernels.windowed import xformers as xformers_segments
from posenc.kernels.windowed import xformers_library
from posenc.kernels.windowed.xformers import XformersBackend
from posenc.kernels.windowed.xformers_library import RUNTIME, WHEEL, find_fmha
from tests.kernels.stand_ins import fmha

LINKED = f"""
import ctypes
_cpp_library_load_exception = None
try:
    ctypes.CDLL({RUNTIME!r})
except OSError as error:
    _cpp_library_load_exception = RuntimeError("xFormers can't load C++/CUDA extensions")
    _cpp_library_load_exception.__cause__ = OSError("Could not load this library: /somewhere/_C.so")
    _cpp_library_load_exception.__cause__.__cause__ = error
"""
"""The import of xformers, with a library that is linked only to the CUDA runtime."""

ASKED = """
import sys, torch
torch.version.cuda = "13.0"  # whatever torch this is, it brings no CUDA 12
from posenc.kernels.windowed import xformers_library as library
if sys.argv[1] == "without":
    library.WHEEL = "no-such-distribution"
print(library.operators_problem())
print("loaded" if library.RUNTIME in open("/proc/self/maps").read() else "absent")
"""


def asked(folder: Path, wheel: str) -> list[str]:
    """The answer of a fresh process about an xformers that is linked to the runtime of CUDA 12."""
    package = folder / "xformers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_cpp_lib.py").write_text(LINKED)
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{ASKED}"
    ran = subprocess.run([sys.executable, "-c", script, wheel], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the wheel is for Linux")
class TestLinkedToAnotherCuda:
    def test_the_library_loads_with_the_wheel(self, tmp_path: Path) -> None:
        assert asked(tmp_path, "with") == ["None", "loaded"]

    def test_the_library_fails_without_the_wheel(self, tmp_path: Path) -> None:
        problem, state = asked(tmp_path, "without")
        if state == "loaded":
            pytest.skip("CUDA 12 is installed on this machine itself")
        assert problem == (
            "the operators of xformers cannot load: they are built for CUDA 12 and need libcudart.so.12, which torch "
            "for CUDA 13.0 does not bring; pip install no-such-distribution"
        )


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the loader was asked for; it finds none."""
    names: list[str] = []

    def loads(library: str) -> bool:
        names.append(library)
        return False

    monkeypatch.setattr(xformers_library, "_loads", loads)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return names


def wheel_at(folder: str) -> SimpleNamespace:
    return SimpleNamespace(locate_file=lambda path: f"{folder}/{path}")


def test_the_runtime_is_taken_from_its_wheel(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_library, "distribution", lambda name: {WHEEL: wheel_at("/site")}[name])
    xformers_library.load_runtime.__wrapped__()
    assert tried == [RUNTIME, f"/site/nvidia/cuda_runtime/lib/{RUNTIME}"]


def test_a_missing_wheel_is_not_an_error_yet(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(xformers_library, "distribution", distribution)
    xformers_library.load_runtime.__wrapped__()
    assert tried == [RUNTIME]


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_no_runtime_is_loaded_that_torch_has_or_cannot_use(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    tried: list[str] = []
    monkeypatch.setattr(xformers_library, "_loads", lambda name: tried.append(name) or True)
    monkeypatch.setattr(xformers_library, "distribution", lambda name: pytest.fail("the wheel was searched for"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    xformers_library.load_runtime.__wrapped__()
    assert tried == ([] if cuda is None else [RUNTIME])


def test_the_runtime_is_loaded_before_xformers_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(xformers_library, "load_runtime", lambda: done.append("runtime"))
    monkeypatch.setattr(xformers_library, "import_module", lambda name: done.append(name) or fmha)
    find_fmha.__wrapped__()
    assert done[:2] == ["runtime", xformers_library.HOMES[0]]


def problem_of(error: Exception | None, monkeypatch: pytest.MonkeyPatch, cuda: str | None = "13.0") -> str | None:
    library = ModuleType("xformers._cpp_lib")
    library._cpp_library_load_exception = error  # type: ignore[attr-defined]
    monkeypatch.setattr(xformers_library, "import_module", {"xformers._cpp_lib": library}.__getitem__)
    monkeypatch.setattr(xformers_library, "load_runtime", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found: str | None = xformers_library.operators_problem.__wrapped__()
    return found


def test_other_failures_are_named_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("cannot load")
    failure.__cause__ = OSError("/home/someone/site/xformers/_C.so: undefined symbol: _ZN3c10")
    problem = str(problem_of(failure, monkeypatch))
    assert "cannot load: _C.so: undefined symbol: _ZN3c10; install the release of xformers" in problem
    assert torch.__version__ in problem
    assert "someone" not in problem
    assert "computes without CUDA" in str(problem_of(failure, monkeypatch, cuda=None))
    assert problem_of(None, monkeypatch) is None


def test_an_absent_xformers_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_library, "find_spec", lambda name: None)
    assert xformers_library.operators_problem.__wrapped__() is None


def test_the_backend_refuses_with_a_cause_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses before it asks xformers, which would only say that it was not built for CUDA."""
    monkeypatch.setattr(xformers_segments, "find_fmha", lambda: (fmha, ""))
    monkeypatch.setattr(xformers_segments, "operators_problem", lambda: "no runtime; pip install it")
    q = torch.zeros(1, 1, 1, 8)
    assert XformersBackend().unavailable(q) == "no runtime; pip install it"
    monkeypatch.setattr(xformers_segments, "operators_problem", lambda: None)
    assert "xformers refuses" in str(XformersBackend().unavailable(q))
    elsewhere = ModuleType("mslk.attention.fmha")
    elsewhere.__dict__.update(cutlass=fmha.cutlass, common=fmha.common)
    monkeypatch.setattr(xformers_segments, "find_fmha", lambda: (elsewhere, ""))
    monkeypatch.setattr(xformers_segments, "operators_problem", lambda: "no runtime; pip install it")
    assert "xformers refuses" in str(XformersBackend().unavailable(q))


@pytest.mark.parametrize("second", [False, True])
def test_flash_attention_4_alone_is_hidden_from_xformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bool
) -> None:
    """It shares a package with FlashAttention-2, for which xformers mistakes it."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    if second:
        (tmp_path / "flash_attn" / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    seen = []

    def imported(name: str) -> ModuleType:
        seen.append(find_spec("flash_attn") is not None)
        return fmha

    monkeypatch.setattr(xformers_library, "import_module", imported)
    assert find_fmha.__wrapped__() == (fmha, "")
    assert seen == [second]
    assert find_spec("flash_attn") is not None
