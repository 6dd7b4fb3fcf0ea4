"""The lines of a comparison: one for each finished cell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora_da_hf.errors import ConfigError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the finished cells, without a last line that was cut off by a kill."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: end_of_lines(content)].splitlines()]


def end_of_lines(content: bytes) -> int:
    """Return the length of the whole lines: the last may lack its end, and is whole if it is JSON."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return end
    return len(content)


def add_line(path: Path, record: dict[str, Any]) -> None:
    """Add a finished cell in place of a line that was cut off, so that it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = ""
    if path.exists():
        content = path.read_bytes()
        end = end_of_lines(content)
        os.truncate(path, end)
        begin = "" if content[:end].endswith(b"\n") or not end else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(begin + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def of_subject(records: list[dict[str, Any]], facts: dict[str, Any], weights_sha256: str) -> list[dict[str, Any]]:
    """Return the records of this model and data.

    Those of other weights by the same name are a ConfigError. Older records have no hash, and count as of the model.
    """
    found = [record for record in records if record["subject"] == facts]
    if any(record.get("weights_sha256") not in (None, weights_sha256) for record in found):
        raise ConfigError(
            f"The output has cells of another model by the name {facts['model']}: its weights differ. Give another "
            "--output, or rename the model's folder."
        )
    return found
