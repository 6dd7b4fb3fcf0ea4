"""`lora-da show`, `lora-da verify`, `lora-da card` and `lora-da refit`."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

from lora_da_hf.cli.flags import (
    add,
    add_base_model,
    add_card,
    add_dataclasses,
    add_folder,
    card_of,
    check_new,
    load_base,
)
from lora_da_hf.cli.output import Output, in_lines
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import kind_of
from lora_da_hf.setting_groups import FREE_IN_REFIT
from lora_da_hf.training.arguments import PREFIX, LoRADAArguments, setting_of_flag


def show_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da show`."""
    add_folder(parser)
    add(parser, "every_layer", "one row for each layer, however many there are")


def run_show(arguments: argparse.Namespace, output: Output) -> None:
    """Show what is in a stored initialisation."""
    from lora_da_hf.artifacts.store import load_init

    manifest = load_init(arguments.folder).manifest
    report, base = manifest.report, manifest.base_model
    values = {
        "folder": str(arguments.folder),
        "base_model": base.name_or_path,
        "base_revision": base.revision,
        "created": manifest.created,
        "max_rank": max(layer.max_rank for layer in report.layers),
        "modules": dict(Counter(kind_of(layer.name) for layer in report.layers)),
        "has_statistics": bool(manifest.statistics_files),
        "bytes": manifest.num_bytes,
    }
    text = f"{in_lines(values)}\n\n{report.table() if arguments.every_layer else report}"
    output.result({**values, **report.to_dict()}, bare=[layer.name for layer in report.layers], text=text)


def verify_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da verify`."""
    add_folder(parser)
    add_base_model(parser, "and check that the initialisation belongs to it")


def run_verify(arguments: argparse.Namespace, output: Output) -> None:
    """Check every file of a stored initialisation, and that it belongs to a base model."""
    from lora_da_hf.artifacts.store import check_base_model, load_init
    from lora_da_hf.pipeline.base_model import base_model_facts

    stored = load_init(arguments.folder)
    manifest, against = stored.manifest, "the base model was not compared"
    if arguments.base_model is not None:
        model = load_base(arguments, output, stored.peft_config)
        for note in check_base_model(manifest, base_model_facts(model)):
            output.message(f"Note: {note}.")
        against = f"it belongs to {arguments.base_model}"
    files, layers, size = len(manifest.files), len(manifest.layers), manifest.num_bytes
    values = {"ok": True, "folder": str(arguments.folder), "files": files, "bytes": size, "layers": layers}
    values["base_model_checked"] = arguments.base_model is not None
    text = f"OK: {files} files, {size / 2**20:,.1f} MiB, {layers} layers; {against}"
    output.result(values, bare="ok", text=text)


def card_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da card`."""
    add_folder(parser)
    add(parser, "output", "write card and plots there (default: the card to stdout)", type=Path, metavar="FOLDER")
    add(parser, "overwrite", "replace a README.md that is there")
    add(parser, "repo_id", "where it is published", metavar="USER/NAME")
    add_card(parser)


def run_card(arguments: argparse.Namespace, output: Output) -> None:
    """Render the card of a stored initialisation, and its plots."""
    from lora_da_hf.artifacts.folders import CARD_FILE
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.hub.cards import render_card, render_page

    facts, init = {**card_of(arguments), "repo_id": arguments.repo_id}, load_init(arguments.folder)
    if arguments.output is None:
        card = render_card(init, **facts).rstrip("\n")
        output.result({"card": card}, bare=card, text=card)
        return
    if (arguments.output / CARD_FILE).exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} has a {CARD_FILE}. Name another folder, or replace it by --overwrite.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for name, content in render_page(init, **facts).items():
        (arguments.output / name).write_bytes(content)
        written.append(str(arguments.output / name))
    output.result({"files": written}, bare=written, text="\n".join(f"Written: {path}" for path in written))


def refit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da refit`. Settings that are not given stay as they were."""
    add_folder(parser)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the new initialisation")
    add(parser, "overwrite", "replace an initialisation that is there; OUTPUT may be FOLDER, and keeps its statistics")
    add(parser, "rank", "rank of the new adapter, at most the stored one", type=int)
    add(parser, "rank_budget", "parameters of the adapter, shared out between the layers", type=int)
    add(parser, "step_size", "how far step 0 goes (default: as the stored steps say)", type=float)
    add_base_model(parser, "and compare it (a DoRA adapter needs it)")
    free = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
        for field in dataclasses.fields(LoRADAArguments)
        if field.name.removeprefix(PREFIX) in FREE_IN_REFIT - {"step_size"}
    ]
    add_dataclasses(parser, dataclasses.make_dataclass("FreeInRefit", free))
    for action in parser._actions:
        if action.dest.startswith(PREFIX):
            action.default, action.help = argparse.SUPPRESS, f"{action.help} (default: as stored)"


def run_refit(arguments: argparse.Namespace, output: Output) -> None:
    """Make another initialisation: a smaller rank, or other settings from stored statistics."""
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.pipeline.refit import refit_init

    check_new(arguments.output, overwrite=arguments.overwrite)
    base, folder = None, str(arguments.output)
    if arguments.base_model is not None:
        base = load_base(arguments, output, load_init(arguments.folder, statistics=False).peft_config)
    given = {name.removeprefix(PREFIX): value for name, value in vars(arguments).items() if name.startswith(PREFIX)}
    refit_init(
        arguments.folder,
        arguments.output,
        config={name: setting_of_flag(name, value) for name, value in given.items()} or None,
        rank=arguments.rank,
        rank_budget=arguments.rank_budget,
        step_size=arguments.step_size,
        base_model=base,
        progress=output.shows_progress,
    )
    output.result({"folder": folder}, bare=folder, text=f"Written to {folder}")
