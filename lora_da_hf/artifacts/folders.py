"""The folder of an initialisation: written in one go, and nothing else is ever replaced by it."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from lora_da_hf.artifacts.card_files import CARD_FILE, PLOTS, is_own_card
from lora_da_hf.artifacts.files import share_as_usual, sync
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, REPORT_FILE, REQUIRED_FILES, STATISTICS_SHARD
from lora_da_hf.errors import ConfigError

logger = logging.getLogger(__name__)

LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
UNLISTED_FILES = (CARD_FILE, *LICENSE_FILES, ".gitattributes", ".gitignore", ".DS_Store", "Thumbs.db", "desktop.ini")
"""What a folder may hold besides, apart from PNG files. Nothing of it is read."""

UNLISTED_FOLDERS = (".cache", ".ipynb_checkpoints", ".git")
"""What the Hub's client, notebooks and git may leave in a folder. Nothing of it is read."""

_PARTIAL = "_{}.partial-"
_OLD = "_{}.old-"
_LOCK = "_{}.lock"
"""Names beside an initialisation begin with an underscore: of a trainer's output folder these are not uploaded."""

_NOT_REPLACEABLE = "{} cannot be replaced ({}). Name a new folder, such as one inside it."


@contextlib.contextmanager
def held_alone(target: Path) -> Generator[None]:
    """Keep other processes from making an initialisation in the same folder for the block.

    The lock of a process that was killed holds nobody up. There is none where nothing can be written or locked.

    Raises:
        ConfigError: if another process is at it.
    """
    target = _behind_links(target)
    file = target.parent / _LOCK.format(target.name)
    lock = FileLock(file, timeout=0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"Another process is making an initialisation in {target}. Wait until it is there and start again, which "
            "uses it, or name another folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        logger.info("LoRA-DA: %s is not locked (%s)", target, error)
    try:
        yield
    finally:
        if lock.is_locked and os.name != "nt":  # where it would have to be closed first
            file.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """Give a temporary folder beside ``target`` that takes its place if the block ends well.

    What was at ``target`` before is replaced, but for a page and pictures that this library did not make. If the block
    fails, it is as it was and nothing is left behind. Behind a link, what it leads to is replaced.

    Raises:
        ConfigError: if what is there cannot be replaced.
    """
    target = _behind_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL.format(target.name), dir=target.parent))
    try:
        yield partial
        for path in partial.iterdir():
            if path.stat().st_nlink == 1:  # else it is a file of the Hub's cache too, and may be another user's
                share_as_usual(path)
            sync(path)
        share_as_usual(partial)
        sync(partial)
        if target.exists():
            with _moved_aside(target):
                partial.rename(target)
        else:
            partial.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _moved_aside(target: Path) -> Generator[None]:
    """Give a folder another name for the block, and put it back if that fails.

    If something took its place, that gets what `_carry_over` says, and the folder is deleted.

    Raises:
        ConfigError: if it cannot be renamed, as a mount point cannot.
    """
    aside = Path(tempfile.mkdtemp(prefix=_OLD.format(target.name), dir=target.parent))
    try:
        target.rename(aside / target.name)
    except OSError as error:
        aside.rmdir()
        raise ConfigError(_NOT_REPLACEABLE.format(target, error.strerror or error)) from error
    try:
        yield
    finally:
        if not target.exists():
            (aside / target.name).rename(target)
        else:
            _carry_over(aside / target.name, target)
        shutil.rmtree(aside, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Move what lies in a folder besides an initialisation, and is not this library's own, to the one replacing it."""
    for path in old.iterdir():
        if may_lie_beside(path) and not _is_own(path) and not (new / path.name).exists():
            path.rename(new / path.name)


def _is_own(path: Path) -> bool:
    if path.name in PLOTS:
        return True
    try:
        return path.name == CARD_FILE and is_own_card(path.read_bytes())
    except OSError:  # one that may not be read is not ours
        return False


def _behind_links(folder: Path) -> Path:
    return folder.resolve() if folder.is_symlink() else folder


def remove_leftovers(target: Path) -> None:
    """Delete what `atomic_folder` could not, because its process was killed; a replaced folder is put back.

    No other process may be writing to ``target``.
    """
    target = _behind_links(target)
    name = glob.escape(target.name)
    for partial in target.parent.glob(_PARTIAL.format(name) + "*"):
        shutil.rmtree(partial)
    for aside in target.parent.glob(_OLD.format(name) + "*"):
        if (aside / target.name).exists() and not target.exists():
            (aside / target.name).rename(target)
        elif (aside / target.name).exists():
            _carry_over(aside / target.name, target)
        shutil.rmtree(aside)


def may_lie_beside(path: Path) -> bool:
    """Tell by its name whether a file may lie in the folder of an initialisation without being a part of it."""
    return path.name in UNLISTED_FILES or path.suffix == ".png"


def _foreign_files(folder: Path) -> list[str]:
    """Return the names in the folder of an initialisation that are neither its own nor may be beside it or go."""
    known = {MANIFEST_FILE, *REQUIRED_FILES, *UNLISTED_FOLDERS} - {".git"}  # which is never replaced
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in known and not STATISTICS_SHARD.fullmatch(path.name) and not may_lie_beside(path)
    )


def check_writable(folder: Path) -> None:
    """Verify that `atomic_folder` can write a folder, before hours are spent on what goes into it.

    Raises:
        ConfigError: if it cannot.
    """
    try:
        folder = _behind_links(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=_PARTIAL.format(folder.name), dir=folder.parent)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"The initialisation cannot be written to {folder} ({error.strerror or error}). Name a folder that can be "
            "written."
        ) from error
    if folder.exists() and (os.path.ismount(folder) or not os.access(folder, os.W_OK)):
        raise ConfigError(_NOT_REPLACEABLE.format(folder, "a mount point, or without the right to write"))


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
    foreign = _foreign_files(folder) if MANIFEST_FILE in names else sorted(names - {REPORT_FILE})
    if foreign:
        raise ConfigError(
            f"{folder} holds something else than an initialisation ({foreign[0]}), which would be lost. Name a new "
            "folder, or move what is there."
        )
