"""The folder of an initialisation: written in one go, and nothing else is ever replaced by it."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from lora_da_hf.artifacts.files import sync
from lora_da_hf.artifacts.schema import MANIFEST_FILE, REPORT_FILE, REQUIRED_FILES, STATISTICS_PREFIX
from lora_da_hf.errors import ConfigError

UNLISTED_FILES = ("README.md", ".gitattributes", ".DS_Store", "Thumbs.db", "desktop.ini")
"""What a folder may hold besides, apart from PNG files. Nothing of it is read."""

UNLISTED_FOLDERS = (".cache", ".ipynb_checkpoints")
"""What the Hub's client and notebooks may leave in a folder. Nothing of it is read."""

_PARTIAL = ".{}.partial-"
_OLD = ".{}.old-"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """Give a temporary folder beside ``target`` that takes its place if the block ends well.

    What was at ``target`` before is replaced. If the block fails, it is as it was and nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL.format(target.name), dir=target.parent))
    try:
        yield partial
        for path in partial.iterdir():
            if path.stat().st_nlink == 1:  # else it is a file of the Hub's cache too, and may be another user's
                path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            sync(path)
        partial.chmod(0o777 & ~_umask())
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=_OLD.format(target.name), dir=target.parent))
            target.rename(aside / target.name)
            try:
                partial.rename(target)
            except BaseException:
                (aside / target.name).rename(target)
                aside.rmdir()
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what `atomic_folder` could not, because its process was killed; a replaced folder is put back.

    No other process may be writing to ``target``.
    """
    name = glob.escape(target.name)
    for partial in target.parent.glob(_PARTIAL.format(name) + "*"):
        shutil.rmtree(partial)
    for aside in target.parent.glob(_OLD.format(name) + "*"):
        if (aside / target.name).exists() and not target.exists():
            (aside / target.name).rename(target)
        shutil.rmtree(aside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def foreign_files(folder: Path) -> list[str]:
    """Return the names in the folder of an initialisation that are neither one's nor a card's nor a picture's."""
    known = {MANIFEST_FILE, *REQUIRED_FILES, *UNLISTED_FILES, *UNLISTED_FOLDERS}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in known and not path.name.startswith(STATISTICS_PREFIX) and path.suffix != ".png"
    )


def check_writable(folder: Path) -> None:
    """Verify that `atomic_folder` can write a folder, before hours are spent on what goes into it.

    Raises:
        ConfigError: if it cannot.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=_PARTIAL.format(folder.name), dir=folder.parent)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"The initialisation cannot be written to {folder} ({error.strerror or error}). Name a folder that can be "
            "written."
        ) from error


def check_replaceable(folder: Path) -> None:
    """Verify that nothing but an initialisation, or the report of one that was used, would be replaced at a folder.

    Raises:
        ConfigError: if something else is there, or the folder has no name of its own.
    """
    if folder.name in ("", ".."):
        raise ConfigError(f"{str(folder)!r} does not name a folder of its own for the initialisation. Name a new one.")
    if not folder.is_dir():
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a link to nothing. Remove it, or name a new folder for the initialisation.")
        if folder.exists():
            raise ConfigError(f"{folder} is a file. Name a new folder for the initialisation.")
        return
    names = {path.name for path in folder.iterdir()}
    foreign = foreign_files(folder) if MANIFEST_FILE in names else sorted(names - {REPORT_FILE})
    if foreign:
        raise ConfigError(
            f"{folder} holds something else than an initialisation ({foreign[0]}), which would be lost. Name a new "
            "folder, or move what is there."
        )
