"""The folder of an initialisation: nothing else is ever replaced by it, and it is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from lora_da_hf.artifacts.manifest import MANIFEST_FILE, REQUIRED_FILES, STATISTICS_FILE
from lora_da_hf.config import setting
from lora_da_hf.errors import ConfigError

CARD_FILE = "README.md"
TAGS = ("lora", "peft", "lora-da", "lora-init")
PLOT_FILE = "guidance_spectra.png"
LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_LEFT_BY_TOOLS = (".cache", ".ipynb_checkpoints", ".gitattributes", ".gitignore", ".DS_Store")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What only you can say on a card."""

    license: str | None = setting(None, "The licence, as the Hub names it, such as apache-2.0.")
    license_name: str | None = setting(None, "Its name, if the licence is other.")
    license_link: str | None = setting(None, "Where its text is, if the licence is other.")
    base_model: str | None = setting(None, "The base's name on the Hub, if a local copy was used.")
    datasets: list[str] | None = field(default=None, metadata={"help": "Data sets on the Hub, or a few words."})
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the samples, such as en."})
    hardware: str | None = setting(None, "What it was computed on.")
    notes: list[str] | None = field(default=None, metadata={"help": "Sentences for the section on limits."})


def may_lie_beside(path: Path) -> bool:
    """Tell by its name whether a file may lie in the folder of an initialisation. Nothing of it is read."""
    return path.name in (CARD_FILE, ".git", *LICENSE_FILES, *_LEFT_BY_TOOLS) or path.suffix == ".png"


def check_replaceable(folder: Path) -> None:
    """Refuse a folder at which anything but an initialisation would be replaced."""
    if folder.name in ("", "..") or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{str(folder)!r} is not a folder for an initialisation. Name a new one.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if any((folder / name).is_symlink() for name in names):
        raise ConfigError(f"{folder} holds links, as the Hub's cache does, where nothing may change. Name another.")
    own = {*_LEFT_BY_TOOLS}
    if MANIFEST_FILE in names:
        own |= {MANIFEST_FILE, *REQUIRED_FILES, *filter(STATISTICS_FILE.fullmatch, names)}
    if names - own:
        raise ConfigError(
            f"{folder} holds {min(names - own)}, which is not of an initialisation and would be lost. Move it, or "
            "name a new folder."
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that `atomic_folder` cannot write, before hours are spent on what goes into it."""
    target = folder.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(dir=target.parent)).rmdir()
        if target.exists() and (os.path.ismount(target) or not os.access(target, os.W_OK)):
            raise OSError("it is a mount point or write-protected")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Name another folder.") from error


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Generator[Path]:
    """Give a temporary folder that takes the place of ``folder``, or of what it links to, if the block ends well.

    It lies beside it, under a name that a trainer does not upload.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"_{target.name}.", dir=target.parent) as place:
        new, old = Path(place) / "new", Path(place) / "old"
        new.mkdir()
        yield new
        mask = os.umask(0)
        os.umask(mask)
        for path in new.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(0o666 & ~mask)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def adopt(source: Path, target: Path) -> None:
    """Give a file a second name, so that it takes no space twice, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
