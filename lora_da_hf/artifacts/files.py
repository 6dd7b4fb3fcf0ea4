"""Files that are there as a whole or not at all, also after a loss of power."""

from __future__ import annotations

import os
from pathlib import Path


def put_in_place(partial: Path, file: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def share_as_usual(path: Path) -> None:
    """Give a file or folder the permissions of any other: safetensors makes files that only their owner can read."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Windows syncs no folder, and no file that is open for reading alone.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
