"""Flags that several verbs have, and reading dataclasses of flags back."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_da_hf.cli.output import Output, hide_progress_bars
from lora_da_hf.errors import ConfigError
from lora_da_hf.training.arguments import ModelArguments

DTYPES = get_args(get_type_hints(ModelArguments)["dtype"])


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

    def loaded_base_model(self, purpose: str) -> None:
        """Add the base model, which is loaded, and its revision."""
        self.flag("base_model", metavar="MODEL", help=f"load this model {purpose}")
        self.flag("model_revision", help="its branch, tag or commit (default: main)")
        self.flag("dtype", choices=DTYPES, help="its precision, as for `lora-da init` (default: as stored)")
        self.flag("trust_remote_code", action="store_true", default=None, help="run model code that comes with it")

    def facts_of_card(self) -> None:
        """Add what can be said on a card besides what was recorded."""
        self.flag("license", help="the base model's licence, as the Hub names it, such as apache-2.0")
        self.flag("license_name", help="its name, if --license is other")
        self.flag("license_link", help="where its text is, if --license is other")
        self.flag("base_model", metavar="MODEL", help="the base's name on the Hub, if a local copy was used")
        self.flag("datasets", nargs="+", default=[], metavar="NAME", help="data sets on the Hub, or a few words")
        self.flag("language", nargs="+", default=[], metavar="CODE", help="languages of the samples, such as en")
        self.flag("hardware", help="what it was computed on")
        self.flag("notes", nargs="+", default=[], metavar="SENTENCE", help="sentences for the section on limits")


def facts_of_card(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `Flags.facts_of_card` parsed, as keyword arguments.

    Raises:
        ConfigError: if the licence is called other and has no name.
    """
    if arguments.license == "other" and not arguments.license_name:
        raise ConfigError("--license other needs --license_name, the name of the licence. Give it, or leave both out.")
    names = ("license", "license_name", "license_link", "base_model", "datasets", "language", "hardware", "notes")
    return {name: getattr(arguments, name) for name in names}


def dataclass_flags(*kinds: Any) -> argparse.ArgumentParser:
    """Return the flags of dataclasses, the same as `transformers.HfArgumentParser` makes of them.

    To import that takes seconds, for torch comes with it, which a help or a mistake in the command line is not worth.
    """
    flags = Flags()
    for kind in kinds:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_field(flags, field, hints[field.name])
    return flags


def _add_field(flags: Flags, field: dataclasses.Field[Any], hint: Any) -> None:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    options: dict[str, Any] = {"type": hint}
    if get_origin(hint) is Literal:
        options = {"type": str, "choices": get_args(hint)}
    elif get_origin(hint) is list:
        options = {"type": get_args(hint)[0], "nargs": "+"}
    elif hint is bool:
        options = {"type": _truth, "nargs": "?", "const": True}
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default  # pyright: ignore[reportCallIssue]
    explained = field.metadata["help"]
    if default not in (None, False) and "default" not in explained.lower():
        explained += f" (default: {default})".replace("%", "%%")
    flags.flag(field.name, default=default, help=explained, **options)


def _truth(text: str) -> bool:
    words = {
        **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
        **dict.fromkeys(("no", "false", "f", "n", "0"), False),
    }
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return words[text.lower()]


def joined(*parts: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the flags of all parts."""
    return argparse.ArgumentParser(add_help=False, parents=parts)


def read(kind: Any, arguments: argparse.Namespace) -> Any:
    """Make a dataclass of flags from what was parsed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})


def positive(text: str) -> int:
    """Read a whole number from 1 on, as a type for `argparse`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


positive.__name__ = "int"  # what argparse calls it


def new_folder(path: Path, *, overwrite: bool) -> Path:
    """Check that an initialisation may be written to a folder, all of whose content would be replaced.

    Raises:
        ConfigError: if there is something else there, or an initialisation that was not to be replaced.
    """
    from lora_da_hf.artifacts.folders import check_replaceable
    from lora_da_hf.artifacts.manifest import MANIFEST_FILE

    check_replaceable(path)
    if (path / MANIFEST_FILE).is_file() and not overwrite:
        raise ConfigError(f"{path} holds an initialisation already. Name a new folder, or give --overwrite.")
    return path


def check_loading(arguments: argparse.Namespace) -> None:
    """Refuse flags about a base model that is not loaded.

    Raises:
        ConfigError: naming one.
    """
    names = ("model_revision", "dtype", "trust_remote_code")
    given = [name for name in names if getattr(arguments, name) is not None]
    if given and arguments.base_model is None:
        raise ConfigError(
            f"--{given[0]} is of the base model, and --base_model names none. Give both, or leave it out."
        )


def load_base_model(arguments: argparse.Namespace, output: Output, peft_config: Mapping[str, Any]) -> Any:
    """Load the model that `Flags.loaded_base_model` parsed.

    Args:
        arguments: What was parsed, a model among it.
        output: Where messages go.
        peft_config: PEFT's configuration of the adapter, which says with which head the base is loaded.
    """
    if not output.shows_progress:
        hide_progress_bars()
    output.message(f"Loading {arguments.base_model}")
    from lora_da_hf.pipeline.base_model import remember_commit
    from lora_da_hf.training.text_model import naming_model

    revision = arguments.model_revision or "main"
    kind = _class_of_base(peft_config)
    with naming_model(arguments.base_model):
        model = kind.from_pretrained(
            arguments.base_model,
            revision=revision,
            dtype=arguments.dtype or "auto",
            trust_remote_code=bool(arguments.trust_remote_code),
        )
    remember_commit(model, revision=revision)
    return model


def base_model_of_folder(arguments: argparse.Namespace, output: Output) -> Any:
    """Load the base model for the initialisation in a folder; None if none was given.

    Raises:
        ArtifactError: if there is no initialisation in the folder.
    """
    check_loading(arguments)
    if arguments.base_model is None:
        return None
    from lora_da_hf.artifacts.adapter_config import check_adapter_config
    from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE
    from lora_da_hf.artifacts.store import check_file, load_manifest

    manifest = load_manifest(arguments.folder)
    path = arguments.folder / ADAPTER_CONFIG_FILE
    check_file(path, manifest.files[ADAPTER_CONFIG_FILE])
    return load_base_model(arguments, output, check_adapter_config(path, manifest))


def _class_of_base(peft_config: Mapping[str, Any]) -> Any:
    """Return the class that loads the base of an adapter: that of its task or, without a task, the one PEFT noted.

    Where neither is known, it is a causal language model.
    """
    import transformers

    from lora_da_hf.hub.cards import base_class_name

    task_type, noted = peft_config.get("task_type"), (peft_config.get("auto_mapping") or {}).get("base_model_class")
    name = base_class_name(task_type, noted)
    return getattr(transformers, name if task_type or name == noted else base_class_name("CAUSAL_LM", None))
