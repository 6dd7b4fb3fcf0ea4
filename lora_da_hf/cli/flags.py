"""Flags that several verbs have, and reading dataclasses of flags back."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import Any

from lora_da_hf.cli.output import Output, hide_progress_bars
from lora_da_hf.errors import ConfigError


class Flags(argparse.ArgumentParser):
    """Flags of a verb, for `argparse`'s ``parents``. Each can be written with dashes too."""

    def __init__(self) -> None:
        super().__init__(add_help=False)

    def flag(self, name: str, **options: Any) -> None:
        """Add ``--name``, and its form with dashes."""
        forms = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        self.add_argument(*forms, **options)

    def folder(self) -> None:
        """Add the folder of a stored initialisation."""
        self.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a stored initialisation")


def dataclass_flags(*kinds: Any) -> argparse.ArgumentParser:
    """Return the flags of dataclasses, as transformers' scripts have them."""
    from transformers import HfArgumentParser

    return HfArgumentParser(kinds, add_help=False, allow_abbrev=False)


def joined(*parts: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the flags of all parts."""
    return argparse.ArgumentParser(add_help=False, parents=parts)


def read(kind: Any, arguments: argparse.Namespace) -> Any:
    """Make a dataclass of flags from what was parsed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


def at_least(least: int) -> Any:
    """Return a type for `argparse`: whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    parse.__name__ = "int"
    return parse


def new_folder(path: Path, *, overwrite: bool) -> Path:
    """Check that an initialisation may be written to a folder, all of whose content would be replaced.

    Raises:
        ConfigError: if there is something else there, or an initialisation that was not to be replaced.
    """
    from lora_da_hf.artifacts.schema import MANIFEST_FILE

    if path.is_file():
        raise ConfigError(f"{path} is a file. Name a folder for the initialisation.")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    if not (path / MANIFEST_FILE).is_file():
        raise ConfigError(f"{path} holds other things than an initialisation. Name a new folder.")
    if not overwrite:
        raise ConfigError(f"{path} holds an initialisation already. Name a new folder, or give --overwrite.")
    return path


def base_model_facts_of(name: str, revision: str | None, output: Output) -> dict[str, Any]:
    """Load a model and return the facts that initialisations are compared with."""
    from transformers import AutoModelForCausalLM

    from lora_da_hf.pipeline.save import base_model_facts

    if not output.shows_progress:
        hide_progress_bars()
    output.message(f"Loading {name}")
    return base_model_facts(AutoModelForCausalLM.from_pretrained(name, revision=revision or "main", dtype="auto"))


def function(home: str, name: str) -> Any:
    """Import a function when it is needed: none of these modules is imported for a help text."""
    return getattr(importlib.import_module(home), name)
