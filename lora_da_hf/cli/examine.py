"""`lora-da show`, `lora-da verify` and `lora-da card`."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from lora_da_hf.cli.flags import Flags, base_model_of_folder, facts_of_card
from lora_da_hf.cli.output import Output, aligned
from lora_da_hf.errors import ConfigError


def show_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da show`."""
    flags = Flags()
    flags.folder()
    flags.flag("plots", type=Path, metavar="FOLDER", help="write the plots there, as PNG files")
    flags.flag("every_layer", action="store_true", help="one row for each layer, however many there are")
    return flags


def run_show(arguments: argparse.Namespace, output: Output) -> None:
    """Print what is in a stored initialisation."""
    from lora_da_hf.artifacts.statistics_store import statistics_files
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.hub.plots import draw_plots
    from lora_da_hf.report import kind_of

    init = load_init(arguments.folder)
    manifest, report, base = init.manifest, init.report, init.manifest.base_model
    written = _write(arguments.plots, draw_plots(report)) if arguments.plots else []
    values: dict[str, Any] = {
        "folder": str(arguments.folder),
        "base_model": base.name_or_path,
        "base_revision": base.revision,
        "created": manifest.created,
        "ranks": sorted({layer.rank for layer in report.layers}),
        "max_rank": max(layer.max_rank for layer in report.layers),
        "alpha": init.peft_config["lora_alpha"],
        "modules": dict(Counter(kind_of(layer.name) for layer in report.layers)),
        "num_samples": report.num_samples,
        "num_tokens": max(layer.num_tokens for layer in report.layers),
        "seed": report.seed,
        "step_size": report.step_size,
        "step_size_by_rank": report.step_size_by_rank,
        "has_statistics": bool(statistics_files(manifest)),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "plots": written,
    }
    rows = [
        ("base model", f"{base.name_or_path or 'not recorded'} @ {base.revision or 'revision not recorded'}"),
        ("computed", manifest.created),
        ("rank", f"{', '.join(map(str, values['ranks']))} of {values['max_rank']} stored"),
        ("modules", ", ".join(f"{name} x {number}" for name, number in values["modules"].items())),
        ("tokens", f"{values['num_tokens']}"),
        ("steps by rank", ", ".join(f"{r}: {step:.4g}" for r, step in report.step_size_by_rank.items()) or "none"),
        ("statistics", "stored" if values["has_statistics"] else "not stored"),
        ("size", f"{values['bytes'] / 2**20:,.1f} MiB"),
        *[("plot", path) for path in written],
    ]
    text = report.table(every_layer=True) if arguments.every_layer else str(report)
    output.result(
        {**values, "layers": [dataclasses.asdict(layer) for layer in report.layers], "kept": report.kept},
        bare=[layer.name for layer in report.layers],
        text=f"{aligned(rows)}\n\n{text}",
    )


def verify_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da verify`."""
    flags = Flags()
    flags.folder()
    flags.loaded_base_model("and check that the initialisation belongs to it")
    return flags


def run_verify(arguments: argparse.Namespace, output: Output) -> None:
    """Check a stored initialisation."""
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.pipeline.base_model import base_model_facts

    model = base_model_of_folder(arguments, output)
    stored = load_init(arguments.folder, base_model=None if model is None else base_model_facts(model))
    manifest = stored.manifest
    size = sum(entry.size for entry in manifest.files.values())
    values = {
        "ok": True,
        "folder": str(arguments.folder),
        "files": len(manifest.files),
        "bytes": size,
        "layers": len(manifest.layers),
        "base_model_checked": model is not None,
    }
    layers = "1 layer" if len(manifest.layers) == 1 else f"{len(manifest.layers)} layers"
    text = f"OK: {len(manifest.files)} files, {size / 2**20:,.1f} MiB, {layers}"
    text += f"; it belongs to {arguments.base_model}" if model is not None else "; the base model was not compared"
    output.result(values, bare="ok", text=text)


def card_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da card`."""
    flags = Flags()
    flags.folder()
    flags.flag("output", type=Path, metavar="FOLDER", help="write card and plots there (default: the card to stdout)")
    flags.flag("overwrite", action="store_true", help="replace a README.md there that is no card of lora-da")
    flags.flag("repo_id", metavar="USER/NAME", help="where it is published")
    flags.flag("commit", help="the commit there that the card names")
    flags.facts_of_card()
    return flags


def run_card(arguments: argparse.Namespace, output: Output) -> None:
    """Render the card of a stored initialisation."""
    from lora_da_hf.artifacts.card_files import CARD_FILE, is_own_card
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.hub.cards import render_card, render_page

    facts = {**facts_of_card(arguments), "repo_id": arguments.repo_id, "commit": arguments.commit}
    init = load_init(arguments.folder)
    if arguments.output is None:
        card = render_card(init, **facts)
        output.result({"card": card}, bare=card.rstrip("\n"), text=card.rstrip("\n"))
        return
    readme = arguments.output / CARD_FILE
    if readme.exists() and not arguments.overwrite and not is_own_card(readme.read_bytes()):
        raise ConfigError(
            f"{readme} is no card of lora-da, and would be lost. Name another folder, or give --overwrite."
        )
    written = _write(arguments.output, render_page(init, **facts))
    output.result({"files": written}, bare=written, text="\n".join(f"Written: {path}" for path in written))


def _write(folder: Path, files: dict[str, bytes]) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} is a file, or lies in one. Name a folder.") from error
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in files]
