"""Verbs and their flags, which are declared beside the function that they run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_da_hf.cli.output import Output

Run = Callable[[argparse.Namespace, Output], None]
Flags = Callable[[argparse.ArgumentParser], Any]
"""What adds one or more flags to a verb's parser."""


@dataclass(frozen=True)
class Verb:
    """A verb of `lora-da`: the function that runs it, whose docstring is its help; an example; its flags."""

    run: Run
    example: str
    flags: tuple[Flags, ...]


def verb(example: str, *flags: Flags) -> Callable[[Run], Verb]:
    """Make a function a verb."""
    return lambda run: Verb(run, example, flags)


def argument(name: str, metavar: str, help_text: str, **options: Any) -> Flags:
    """Make an argument that has no flag."""
    return lambda parser: parser.add_argument(name, metavar=metavar, help=help_text, **options)


def flag(name: str, help_text: str, **options: Any) -> Flags:
    """Make ``--name``, and its form with dashes; a switch, unless it has options."""
    forms = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return lambda parser: parser.add_argument(*forms, help=help_text, **(options or {"action": "store_true"}))


def flags_of(*kinds: Any) -> Flags:
    """Make the flags that `transformers.HfArgumentParser` makes of dataclasses."""

    def add(parser: argparse.ArgumentParser) -> None:
        from transformers.hf_argparser import HfArgumentParser  # without torch

        for action in HfArgumentParser(kinds, add_help=False)._actions:
            parser._add_action(action)

    return add


def read(kind: Any, arguments: argparse.Namespace) -> Any:
    """Make a dataclass of flags from what was parsed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


MODEL = argument("model", "MODEL", "causal language model: a name on the Hub or a local folder")
FOLDER = argument("folder", "FOLDER", "folder of a stored initialisation", type=Path)
