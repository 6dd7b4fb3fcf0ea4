"""Flags that several verbs have, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_da_hf.cli.output import Output
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


def add_base_model(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the base model, which is loaded, and how."""
    add(parser, "base_model", f"load this model {purpose}", metavar="MODEL")
    add(parser, "model_revision", "its branch, tag or commit (default: main)", default="main")
    add(parser, "dtype", "its precision (default: as stored)", default="auto")
    add(parser, "trust_remote_code", "run model code that comes with it")


def check_new(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds an initialisation already."""
    from lora_da_hf.artifacts.manifest import MANIFEST_FILE

    if (folder / MANIFEST_FILE).is_file() and not overwrite:
        raise ConfigError(f"{folder} holds an initialisation already. Name a new folder, or give --overwrite.")


def load_base(arguments: argparse.Namespace, output: Output, peft_config: Mapping[str, Any]) -> Any:
    """Load the model that `add_base_model` parsed, with the head of the adapter's task."""
    import transformers

    from lora_da_hf.hub.cards import base_class_name
    from lora_da_hf.pipeline.base_model import remember_commit
    from lora_da_hf.training.text import naming_model

    output.message(f"Loading {arguments.base_model}")
    kind = getattr(transformers, base_class_name(peft_config.get("task_type") or "CAUSAL_LM"))
    with naming_model(arguments.base_model):
        model = kind.from_pretrained(
            arguments.base_model,
            revision=arguments.model_revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    remember_commit(model, revision=arguments.model_revision)
    return model
