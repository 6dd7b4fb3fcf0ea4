"""What every verb has: flags, an output in three forms, and errors in a line.

Results go to stdout, and everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_da_hf.errors import LoRADAError
from lora_da_hf.report import in_columns


class Output:
    """Prints in one of three forms, to what is stdout when it is made."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet, self._stdout = as_json, quiet, sys.stdout

    @property
    def shows_progress(self) -> bool:
        """Whether a person is watching, who may want progress bars."""
        return sys.stderr.isatty() and not self.as_json and not self.quiet

    def hide_progress(self) -> None:
        """Turn off the bars of the libraries that download, read and load, unless a person is watching."""
        if not self.shows_progress:
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
            os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read on import, which takes seconds
            hides = {"datasets": "disable_progress_bars", "transformers.utils.logging": "disable_progress_bar"}
            for name in hides.keys() & sys.modules.keys():
                getattr(sys.modules[name], hides[name])()

    def result(self, values: Mapping[str, Any], *, bare: str | Sequence[str], text: str | None = None) -> None:
        """Print the result: ``values`` as JSON, ``bare`` for `--quiet`, and for people ``text``, or else the values."""
        if self.as_json:
            shown = json.dumps(values, separators=(",", ":"), allow_nan=False)
        elif self.quiet:
            shown = printable(bare if isinstance(bare, str) else "\n".join(bare))
        else:
            shown = printable(in_lines(values) if text is None else text)
        print(shown, file=self._stdout, flush=True)

    def message(self, text: str, *, always: bool = False) -> None:
        """Tell a person something beside the result."""
        if always or not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """Return what went wrong, and what to do about it where the error does not say that."""
    if isinstance(error, LoRADAError):
        return str(error)
    text = " ".join(str(error).strip().splitlines()[:4]) or type(error).__name__
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {text} Run it again with --debug for the traceback."
    advice = "Check the name and the connection; a private or gated repository needs `hf auth login`."
    return f"{text} {advice}" if error.errno is None else text  # what the operating system says is enough


def printable(text: str) -> str:
    """Replace control characters, which names from elsewhere may hold to take over a terminal."""
    return "".join("�" if c != "\n" and unicodedata.category(c).startswith("C") else c for c in text)


def in_lines(values: Mapping[str, Any]) -> str:
    """Return names and values in two columns, without those that are None."""
    rows = [(name.replace("_", " "), str(value)) for name, value in values.items() if value is not None]
    return "\n".join(in_columns(rows))


Run = Callable[[argparse.Namespace, Output], None]
Flags = Callable[[argparse.ArgumentParser], Any]


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
            if action.nargs == "+" and action.default is None:  # repeated, it adds
                options: dict[str, Any] = {"type": action.type, "help": action.help}
                parser.add_argument(*action.option_strings, nargs="+", action="extend", **options)
            else:
                parser._add_action(action)

    return add


def read(kind: Any, arguments: argparse.Namespace) -> Any:
    """Make a dataclass of flags from what was parsed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


MODEL = argument("model", "MODEL", "causal language model: a name on the Hub or a local folder")
FOLDER = argument("folder", "FOLDER", "folder of a stored initialisation", type=Path)
