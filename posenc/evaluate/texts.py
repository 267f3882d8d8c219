"""Texts to measure on: files, and the English prose and source code that ship with every Python."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.files import expanded

BUILT_IN = "pydoc"
SOURCE_CODE = "stdlib"
_PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "urllib",
    "xml",
)


@dataclass(frozen=True)
class Text:
    """A named text."""

    name: str
    content: str


def read_text(source: str | Path = BUILT_IN) -> Text:
    """Read a text.

    Parameters
    ----------
    source : str or Path
        ``"pydoc"`` for the language reference inside every Python (``pydoc_data.topics``), else a
        path to a UTF-8 text file. ``"stdlib"`` is the source code of some packages of the standard library.

    Raises
    ------
    InvalidInputError
        If the file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    if str(source) == BUILT_IN:
        from pydoc_data.topics import topics

        return Text("pydoc_data.topics", "\n".join(topics[key] for key in sorted(topics)))
    if str(source) == SOURCE_CODE:
        return Text("standard library", _source_code())
    path = expanded(source)
    try:
        content = decode(path.read_bytes(), name=str(path))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if not content.strip():
        raise InvalidInputError(f"{path}: the text is empty.")
    return Text(path.name, content)


def decode(content: bytes, *, name: str) -> str:
    """UTF-8 text with line ends as ``\\n``, whatever the encoding of this machine.

    Raises
    ------
    InvalidInputError
        If it is not UTF-8; `name` says what is not.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{name}: is not UTF-8 text (byte {error.start}). Convert it to UTF-8 and try again."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _source_code() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for package in _PACKAGES for file in sorted((root / package).rglob("*.py"))]
    if not files:
        raise InvalidInputError(f"{SOURCE_CODE}: this Python has no sources of its standard library.")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def tokenize(tokenizer: object, text: Text) -> NDArray[np.int64]:
    """Tokens of the whole text, without special tokens.

    Raises
    ------
    InvalidInputError
        If the text has no tokens.
    """
    encode = tokenizer.encode  # type: ignore[attr-defined]
    tokens = np.asarray(encode(text.content, add_special_tokens=False, verbose=False), dtype=np.int64)
    if not len(tokens):
        raise InvalidInputError(f"{text.name}: the text is empty.")
    return tokens


def cut_documents(tokens: NDArray[np.int64], length: int, count: int, *, step: int, name: str) -> NDArray[np.int64]:
    """Cut up to `count` documents of exactly `length` tokens, spread evenly over the text.

    Documents do not overlap if the text is long enough. In a shorter text there are fewer of them, so that the last
    `step` tokens of each (the scored ones) still never overlap.

    Raises
    ------
    InvalidInputError
        If not even one document fits.
    """
    if len(tokens) < length:
        raise InvalidInputError(
            f"{name}: the text has {len(tokens)} tokens, too short for an input of {length}. "
            "Give a longer text or shorter lengths."
        )
    fitting = min(count, (len(tokens) - length) // step + 1)
    ends = np.linspace(length, len(tokens), fitting).astype(np.int64) if fitting > 1 else np.array([length])
    return np.stack([tokens[end - length : end] for end in ends])
