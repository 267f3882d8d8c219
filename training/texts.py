"""Fetch and read the English texts that the tiny model is trained and evaluated on.

The texts come from two Debian packages (six Jane Austen novels, the Jargon File) and from the
docstrings of the running Python's standard library. `pydoc_data` is never used for training: its
language reference is held-out text, here and in the demo.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import lzma
import platform
import subprocess
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.rdata import unserialize

PACKAGES = ("r-cran-janeaustenr", "jargon-text")
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
HELD_OUT_NOVEL = "persuasion"

_AUSTEN_DATA = Path("usr/lib/R/site-library/janeaustenr/data")
_JARGON_TEXT = Path("usr/share/doc/jargon-text/jargon.txt.gz")
_SHINGLE = 13
_SKIPPED_MODULES = frozenset({"pydoc_data", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})


class TextsError(Exception):
    """A text could not be fetched or read."""


@dataclass(frozen=True)
class Text:
    """One named text.

    Attributes
    ----------
    name
        The name of the text in the training record.
    source
        Its origin: a Debian package with its version, or the standard library.
    documents
        The text, split into unrelated parts.
    """

    name: str
    source: str
    documents: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """Return name, source, size and checksum for the training record."""
        joined = "\x00".join(self.documents).encode()
        return {
            "name": self.name,
            "source": self.source,
            "documents": len(self.documents),
            "characters": sum(map(len, self.documents)),
            "sha256": hashlib.sha256(joined).hexdigest(),
        }


def fetch(cache: Path) -> Path:
    """Download and unpack the Debian packages that `cache` does not hold yet.

    Parameters
    ----------
    cache
        The folder to fill, with one subfolder per package.

    Returns
    -------
    Path
        `cache`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (cache / package).is_dir():
            continue
        _run(["apt-get", "download", package], cache)
        archives = sorted(cache.glob(f"{package}_*.deb"))
        if not archives:
            raise TextsError(f"apt-get download {package} left no archive in {cache}")
        _run(["dpkg", "-x", archives[-1].name, package], cache)
    return cache


def training_texts(folder: Path) -> list[Text]:
    """Read the texts to train on: five novels, the Jargon File, the standard library's docstrings."""
    novels = read_novels(folder)
    technical = [read_jargon(folder), without_overlap(read_docstrings(), read_topics())]
    return [*(novels[name] for name in NOVELS if name != HELD_OUT_NOVEL), *technical]


def held_out_texts(folder: Path) -> list[Text]:
    """Read the texts that are only evaluated on: one whole novel and Python's language reference."""
    return [read_novels(folder)[HELD_OUT_NOVEL], read_topics()]


def read_novels(folder: Path) -> dict[str, Text]:
    """Read the six novels from the R database in the unpacked r-cran-janeaustenr package."""
    data = folder / PACKAGES[0] / _AUSTEN_DATA
    index = unserialize(_inflate_file(data / "Rdata.rdx"))
    blocks = (data / "Rdata.rdb").read_bytes()
    source = _debian_source(folder, PACKAGES[0])
    novels = {}
    for name in NOVELS:
        offset, size = index["variables"][name]
        lines = unserialize(_inflate_block(blocks[offset : offset + size]))
        novels[name] = Text(name, source, ("\n".join(lines).strip() + "\n",))
    return novels


def read_jargon(folder: Path) -> Text:
    """Read the Jargon File, without its tables and its indentation."""
    path = folder / PACKAGES[1] / _JARGON_TEXT
    try:
        raw = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        raise TextsError(f"cannot read {path}: {error}") from error
    kept = [line.strip() for line in raw.splitlines() if not any("\u2500" <= c <= "\u257f" for c in line)]
    text = unicodedata.normalize("NFKC", "\n".join(kept))
    return Text("jargon", _debian_source(folder, PACKAGES[1]), (text,))


def read_docstrings() -> Text:
    """Read every docstring of at least 80 characters in the standard library, except `pydoc_data`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_MODULES.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for document in _docstrings(tree):
            if len(document) >= 80:
                documents[document + "\n"] = None
    return Text("docstrings", f"Python {platform.python_version()} standard library", tuple(documents))


def without_overlap(text: Text, held_out: Text) -> Text:
    """Drop the documents that share 13 consecutive words with a held-out text."""
    forbidden = {words for document in held_out.documents for words in _shingles(document)}
    kept = tuple(document for document in text.documents if forbidden.isdisjoint(_shingles(document)))
    return Text(text.name, text.source, kept)


def read_topics() -> Text:
    """Read `pydoc_data.topics`, Python's own language reference, which is never used for training."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "Python standard library", ("\n".join(topics[key] for key in sorted(topics)),))


def _shingles(document: str) -> Iterator[tuple[str, ...]]:
    words = document.split()
    return (tuple(words[at : at + _SHINGLE]) for at in range(len(words) - _SHINGLE + 1))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=False)
            if found:
                yield inspect.cleandoc(found)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise TextsError(f"{command[0]} is missing: unpack {', '.join(PACKAGES)} yourself, pass --texts") from error
    except subprocess.CalledProcessError as error:
        raise TextsError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


def _debian_source(folder: Path, package: str) -> str:
    archives = sorted(folder.glob(f"{package}_*.deb"))
    version = archives[-1].name.split("_")[1] if archives else "of unknown version"
    return f"Debian package {package} {version}"


def _inflate_file(path: Path) -> bytes:
    try:
        return zlib.decompress(path.read_bytes(), zlib.MAX_WBITS | 32)
    except (OSError, zlib.error) as error:
        raise TextsError(f"cannot read {path}: {error}") from error


def _inflate_block(block: bytes) -> bytes:
    # An R database block starts with its uncompressed size in four bytes; zlib follows, or a letter and xz.
    if block[4:5] == b"Z":
        return lzma.decompress(block[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return zlib.decompress(block[4:])
