"""Outside text on a card: whatever a manifest says, it stays text and cannot become markup, metadata or code."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

MAX_LENGTH = 300
_MARKUP = re.compile(r"([\\`*_\[\]~|$@#!]|:(?=/))")
_BLOCK_START = re.compile(r"^(?=[-+=>.)])")
_LIST_NUMBER = re.compile(r"^(\d+)(?=[.)](?: |$))")
_WWW = re.compile(r"(?i)(?<=www)\.")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


class Markdown(str):
    """Text that is Markdown already and is printed as it stands."""

    __slots__ = ()


def clean(value: Any) -> str:
    """Return text on one line, without control, format and surrogate characters, and of a bounded length."""
    text = "".join(" " if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 1]}…"


def escape(value: Any) -> Markdown:
    """Return a value as Markdown that shows just this text, in a paragraph or a table."""
    if isinstance(value, Markdown):
        return value
    text = _MARKUP.sub(r"\\\1", clean(value)).translate(_ENTITIES)
    return Markdown(_LIST_NUMBER.sub(r"\1\\", _BLOCK_START.sub(r"\\", _WWW.sub(r"\\.", text))))


def code(value: Any) -> Markdown:
    """Return a value as inline code. The two characters that could end it or a table's cell are replaced."""
    text = clean(value).replace("`", "'").replace("|", "¦")
    return Markdown(f"`{text}`" if text else "*(empty)*")
