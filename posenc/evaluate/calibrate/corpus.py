"""The documents that are scored: read texts, cut them into documents, and shuffle these."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posenc.calibration.file import TextRecord
from posenc.errors import InvalidInputError
from posenc.evaluate.texts import Text, cut_documents, read_text, tokenize

DOCSTRINGS = "docstrings:"
SHORTEST = 80
"""Docstrings with fewer characters are left out: they are hardly prose."""


@dataclass(frozen=True)
class Corpus:
    """Documents in the order they are scored, and the texts they were cut from.

    Parameters
    ----------
    documents : int64 [N, L]
        Shuffled, so that the first few are a fair sample of all.
    texts : tuple of TextRecord
        One per source.
    """

    documents: NDArray[np.int64]
    texts: tuple[TextRecord, ...]

    @property
    def sha256(self) -> str:
        """Hash of all documents in their order."""
        return hashlib.sha256(self.documents.astype("<i8").tobytes()).hexdigest()


def read_source(source: str) -> Text:
    """A text by name: ``docstrings:PACKAGE`` of an installed package, or what ``posenc ppl --text`` takes.

    Raises
    ------
    InvalidInputError
        If there is no such text, or it is empty.
    """
    if not source.startswith(DOCSTRINGS):
        return read_text(source)
    package = source.removeprefix(DOCSTRINGS)
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        raise InvalidInputError(f"{source}: no package {package!r} with Python sources is installed.")
    texts = dict.fromkeys(_docstrings(Path(spec.origin).parent))
    if not texts:
        raise InvalidInputError(f"{source}: the package has no docstrings.")
    return Text(source, "\n".join(texts))


def draw(
    loaded: Any, sources: Sequence[str], *, length: int, count: int, scored: int, seed: int, vocabulary: int
) -> Corpus:
    """Cut documents from every source in equal number and shuffle them.

    Parameters
    ----------
    loaded : Loaded
        Its tokenizer is used.
    length, count, scored : int
        Tokens of a document, documents in all, and tokens scored at the end of each.
    seed : int
        Of the order.
    vocabulary : int
        Token ids the model embeds.

    Raises
    ------
    InvalidInputError
        If a text is too short, or the tokenizer makes tokens that the model does not have.
    """
    parts, texts = [], []
    for number, source in enumerate(sources):
        text = read_source(source)
        tokens = tokenize(loaded.tokenizer, text)
        if int(tokens.max()) >= vocabulary:
            raise InvalidInputError(
                f"{loaded.name}: the tokenizer does not match the model: it makes token {int(tokens.max())} of "
                f"{text.name}, and the model embeds {vocabulary}. Load the tokenizer that the model was trained with."
            )
        share = count // len(sources) + (number < count % len(sources))
        if share:
            parts.append(cut_documents(tokens, length, share, step=scored, name=text.name))
        digest = hashlib.sha256(text.content.encode()).hexdigest()
        texts.append(TextRecord(name=text.name, tokens=len(tokens), sha256=digest))
    documents = np.concatenate(parts)
    return Corpus(documents[np.random.default_rng(seed).permutation(len(documents))], tuple(texts))


def check_apart(calibration: Corpus, report: Corpus) -> None:
    """Check that no report text is also a calibration text.

    Raises
    ------
    InvalidInputError
        If one is; the message names it.
    """
    chosen_on = {text.sha256 for text in calibration.texts}
    for text in report.texts:
        if text.sha256 in chosen_on:
            raise InvalidInputError(
                f"{text.name}: is both a calibration text and the report text. Parameters look better than they are "
                "on the text they were chosen on: report on another one."
            )


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue  # sources for another Python, as packages carry them for their tests
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                if docstring and len(docstring) >= SHORTEST:
                    yield inspect.cleandoc(docstring) + "\n"
