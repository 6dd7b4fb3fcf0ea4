"""Flags that several verbs have, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lora_da_hf.errors import ConfigError


def add(parser: argparse.ArgumentParser, name: str, help_text: str, **options: Any) -> None:
    """Add ``--name``, and its form with dashes; a switch, unless it has options."""
    forms = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*forms, help=help_text, **(options or {"action": "store_true"}))


def add_dataclasses(parser: argparse.ArgumentParser, *kinds: Any) -> None:
    """Add the flags that `transformers.HfArgumentParser` makes of dataclasses."""
    from transformers.hf_argparser import HfArgumentParser  # without torch

    for action in HfArgumentParser(kinds, add_help=False)._actions:
        parser._add_action(action)


def read(kind: Any, arguments: argparse.Namespace) -> Any:
    """Make a dataclass of flags from what was parsed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model, whose flags are those of `ModelArguments`."""
    parser.add_argument("model", metavar="MODEL", help="causal language model: a name on the Hub or a local folder")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a stored initialisation."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a stored initialisation")


def check_new(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds an initialisation already."""
    from lora_da_hf.artifacts.manifest import MANIFEST_FILE

    if (folder / MANIFEST_FILE).is_file() and not overwrite:
        raise ConfigError(f"{folder} holds an initialisation already. Name a new folder, or give --overwrite.")
