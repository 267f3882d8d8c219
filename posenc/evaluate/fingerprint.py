"""Identify tokenizers and texts by their content, not by their names. For models see posenc.hf.fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from posenc.evaluate.texts import Text

_SAMPLE = "The quick brown fox: 12345, na\u00efve\n\tfoo_bar(x) -> 'y'"


def of_tokenizer(tokenizer: Any) -> str:
    """sha256 over a tokenizer's vocabulary and how it encodes a sample of text, in hex."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(_SAMPLE, add_special_tokens=False)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def of_text(text: Text) -> str:
    """sha256 over a text, in hex."""
    return hashlib.sha256(text.content.encode()).hexdigest()
