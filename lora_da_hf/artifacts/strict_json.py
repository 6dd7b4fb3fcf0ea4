"""JSON from outside: read strictly, and checked against the types that a dataclass announces."""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_da_hf.errors import ArtifactError

_MAX_DEPTH = 16
_MAX_TEXT = 4096
_MAX_INT = 2**63


def malformed(what: str) -> ArtifactError:
    """Return the error of something from outside that was not written so, with what to do about it.

    Args:
        what: Which file, and what is wrong with it.
    """
    return ArtifactError(f"{what}. Fetch it again, or ask who made it.")


def too_large(source: str, size: int, limit: int) -> ArtifactError:
    """Return the error of JSON that is not even parsed.

    Args:
        source: Where it comes from.
        size: Its bytes.
        limit: What it may have at most.
    """
    return ArtifactError(
        f"{source} has {size:,} bytes, and at most {limit:,} can be needed. Do not use it; ask who made it."
    )


def parse_json(data: bytes, source: str) -> Any:
    """Read JSON without duplicate keys, without NaN and infinity, and of a bounded depth.

    Args:
        data: UTF-8 text.
        source: Where it comes from, for messages.

    Raises:
        ArtifactError: if it is anything else.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        _check_depth(values)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid JSON ({error}): truncated or changed. Fetch it again.") from error
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    if not all(is_plain_text(key) for key in values):
        raise ValueError("a key holds control characters or is too long")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _children(outer)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")


def _children(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer


def is_plain_text(text: str) -> bool:
    """Tell whether a text is printable, line breaks apart, and not too long: fit for a message, a table or a card."""
    shown = "".join(" " if unicodedata.category(character) == "Zs" else character for character in text)
    return len(text) <= _MAX_TEXT and shown.replace("\n", "").isprintable()


def read_dataclass(kind: Any, values: Any, source: str) -> Any:
    """Make a dataclass of a JSON object that has its fields and no others, each of the announced type.

    Args:
        kind: The dataclass.
        values: What `parse_json` read.
        source: Where it comes from, for messages.

    Raises:
        ArtifactError: naming the field that is missing, unknown or of another type.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(hints):  # pyright: ignore[reportUnknownArgumentType]
        raise ArtifactError(f"{source}: expected the fields {sorted(hints)}. Fetch it again.")
    check_types(values, hints, source)  # pyright: ignore[reportUnknownArgumentType]
    return kind(**values)


def check_types(values: dict[str, Any], hints: dict[str, Any], source: str) -> None:
    """Compare values with type hints; the hint of a value that has none is anything.

    Raises:
        ArtifactError: naming the first value of another type.
    """
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise ArtifactError(f"{source}: {name}={repr(value)[:80]} is not {hint}. Fetch it again.")


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a JSON value is of a type: numbers finite, text plain, containers to the last entry.

    Keys of a mapping from int are decimal text, as JSON has no others; a nested dataclass may be any mapping.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return _is_int(value)
    if origin is tuple:
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(arguments)  # pyright: ignore[reportUnknownArgumentType]
            and all(map(fits, value, arguments))  # pyright: ignore[reportUnknownArgumentType]
        )
    if origin is list:
        return isinstance(value, list) and all(fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_key(key, arguments[0]) and fits(entry, arguments[1]) for key, entry in value.items()
        )
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (dict, hint))  # pyright: ignore[reportArgumentType]
    return isinstance(value, hint) and (not isinstance(value, str) or is_plain_text(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INT


def _is_key(key: str, hint: Any) -> bool:
    return hint is not int or (key.isascii() and key.isdecimal() and str(int(key[:20])) == key)
