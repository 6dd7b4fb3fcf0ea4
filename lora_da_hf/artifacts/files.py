"""Files that are there as a whole or not at all, also after a loss of power."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.errors import ArtifactError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors.

    Raises:
        ArtifactError: if the disk takes no more of them.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free
        raise ArtifactError(
            f"{path} could not be written ({error}). It takes {size / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            "free there: make room, or name a folder on another disk."
        ) from error


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

    Windows syncs no folder, and no file that is open for reading alone; some file systems sync no folder either.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
