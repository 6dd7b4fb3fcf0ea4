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
    """Return the length of the whole lines."""
    return content.rfind(b"\n") + 1


def add_line(path: Path, record: dict[str, Any]) -> None:
    """Add a finished cell in place of a line that was cut off, so that it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, end_of_lines(path.read_bytes()))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def of_subject(records: list[dict[str, Any]], facts: dict[str, Any], weights_sha256: str) -> list[dict[str, Any]]:
    """Return the records of this model and data.

    Args:
        records: All of a file.
        facts: Of the model and the data; of the model they have the name alone.
        weights_sha256: Of the model. Older records have none, and count as of the model of that name.

    Raises:
        ConfigError: if a record is of other weights by the same name.
    """
    found = [record for record in records if record["subject"] == facts]
    if any(record.get("weights_sha256") not in (None, weights_sha256) for record in found):
        raise ConfigError(
            f"The output has cells of another model by the name {facts['model']}: its weights differ. Give another "
            "--output, or rename the model's folder."
        )
    return found
