"""What is done with a stored initialisation: `show`, `verify`, `card`, `refit`, `push`, `pull` and `list`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_da_hf.artifacts.folders import CARD_FILE, CardFacts
from lora_da_hf.cli.flags import (
    add,
    add_dataclasses,
    add_folder,
    check_new,
    read,
)
from lora_da_hf.cli.output import Output, in_lines
from lora_da_hf.config import FREE_IN_REFIT
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import in_columns, kind_of
from lora_da_hf.training.arguments import PREFIX, LoRADAArguments, setting_of_flag

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


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
    add(parser, "base_model", "load this model and check that the initialisation belongs to it", metavar="MODEL")
    add(parser, "model_revision", "its branch, tag or commit (default: main)", default="main")
    add(parser, "dtype", "its precision (default: as stored)", default="auto")
    add(parser, "trust_remote_code", "run model code that comes with it")


def run_verify(arguments: argparse.Namespace, output: Output) -> None:
    """Check every file of a stored initialisation, and that it belongs to a base model."""
    from lora_da_hf.artifacts.store import check_base_model, load_init
    from lora_da_hf.pipeline.base_model import base_model_facts

    stored = load_init(arguments.folder)
    if arguments.base_model is not None:
        output.message(f"Loading {arguments.base_model}")
        model = _load_base(arguments, stored.peft_config.get("task_type") or "CAUSAL_LM")
        for note in check_base_model(stored.manifest, base_model_facts(model)):
            output.message(f"Note: {note}.")
    values = {
        "ok": True,
        "folder": str(arguments.folder),
        "files": len(stored.manifest.files),
        "bytes": stored.manifest.num_bytes,
        "layers": len(stored.manifest.layers),
        "base_model": arguments.base_model or "not compared",
    }
    output.result(values, bare="ok")


def _load_base(arguments: argparse.Namespace, task: str) -> Any:
    import transformers

    from lora_da_hf.hub.cards import base_class_name
    from lora_da_hf.pipeline.base_model import remember_commit
    from lora_da_hf.training.text import naming_model

    with naming_model(arguments.base_model):
        model = getattr(transformers, base_class_name(task)).from_pretrained(
            arguments.base_model,
            revision=arguments.model_revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    remember_commit(model, revision=arguments.model_revision)
    return model


def card_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da card`."""
    add_folder(parser)
    add(parser, "output", "write card and plots there (default: the card to stdout)", type=Path, metavar="FOLDER")
    add(parser, "overwrite", "replace a README.md that is there")
    add(parser, "repo_id", "where it is published", metavar="USER/NAME")
    add_dataclasses(parser, CardFacts)


def run_card(arguments: argparse.Namespace, output: Output) -> None:
    """Render the card of a stored initialisation, and its plots."""
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.hub.cards import render_card, render_page

    facts, init = {**vars(read(CardFacts, arguments)), "repo_id": arguments.repo_id}, load_init(arguments.folder)
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
    add_dataclasses(parser, LoRADAArguments)
    for action in parser._actions:
        if action.dest.startswith(PREFIX):
            is_free = action.dest.removeprefix(PREFIX) in FREE_IN_REFIT - {"step_size"}
            action.help = f"{action.help} (default: as stored)" if is_free else argparse.SUPPRESS
            action.default = argparse.SUPPRESS


def run_refit(arguments: argparse.Namespace, output: Output) -> None:
    """Make another initialisation: a smaller rank, or other settings from stored statistics."""
    from lora_da_hf.pipeline.refit import refit_init

    check_new(arguments.output, overwrite=arguments.overwrite)
    folder = str(arguments.output)
    given = {name.removeprefix(PREFIX): value for name, value in vars(arguments).items() if name.startswith(PREFIX)}
    refit_init(
        arguments.folder,
        arguments.output,
        config={name: setting_of_flag(name, value) for name, value in given.items()} or None,
        rank=arguments.rank,
        rank_budget=arguments.rank_budget,
        step_size=arguments.step_size,
        progress=output.shows_progress,
    )
    output.result({"folder": folder}, bare=folder, text=f"Written to {folder}")


def push_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da push`."""
    add_folder(parser)
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there")
    add(parser, "public", "let everybody see it (default: private)")
    add(parser, "card", "a card of your own (default: as `lora-da card` renders it)", type=Path, metavar="FILE")
    add_dataclasses(parser, CardFacts)
    add(parser, "create_pr", "open a pull request instead of writing to the branch")
    add(parser, "revision", "branch to write to (default: main)", metavar="BRANCH")
    add(parser, "parent_commit", "refuse if the branch is not at this commit", metavar="SHA")
    add(parser, "commit_message", "message of the commit", metavar="TEXT")


def run_push(arguments: argparse.Namespace, output: Output) -> None:
    """Publish a stored initialisation on the Hub, private unless asked otherwise."""
    from lora_da_hf.hub import push_init

    pushed = push_init(
        arguments.folder,
        arguments.repo_id,
        private=not arguments.public,
        card=arguments.card.read_text(encoding="utf-8") if arguments.card else None,
        create_pr=arguments.create_pr,
        revision=arguments.revision,
        parent_commit=arguments.parent_commit,
        commit_message=arguments.commit_message,
        **vars(read(CardFacts, arguments)),
    )
    repo_id = pushed.repo_url.repo_id
    values = {"url": pushed.commit_url, "repo_id": repo_id, "commit": pushed.oid, "pull_request_url": pushed.pr_url}
    output.result(values, bare=f"{repo_id}@{pushed.oid}")


def pull_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da pull`."""
    parser.add_argument("repo_id", metavar="USER/NAME[@REVISION]", help="repository on the Hub")
    add(parser, "revision", "branch, tag or commit; the same as behind an @", metavar="NAME")
    add(parser, "cache_dir", "where it is kept (default: the Hub's cache)", metavar="FOLDER")
    add(parser, "local_dir", "a new folder for a copy of your own", type=Path, metavar="FOLDER")
    add(parser, "local_files_only", "use what is in the cache, and do not connect")


def run_pull(arguments: argparse.Namespace, output: Output) -> None:
    """Fetch an initialisation from the Hub and check it."""
    from lora_da_hf.hub import pull_init

    repo_id, at, behind = arguments.repo_id.partition("@")
    if at and arguments.revision is not None:
        raise ConfigError(f"{arguments.repo_id} and --revision both name a revision. Give one of them.")
    pulled = pull_init(
        repo_id,
        revision=behind if at else arguments.revision,
        cache_dir=arguments.cache_dir,
        local_dir=arguments.local_dir,
        local_files_only=arguments.local_files_only,
    )
    folder = str(pulled.folder)
    output.result({"folder": folder, "repo_id": repo_id, "commit": pulled.source.rpartition("@")[2]}, bare=folder)


def list_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da list`."""
    add(parser, "base_model", "those for this base model", metavar="MODEL")
    add(parser, "author", "those of this user or organisation", metavar="NAME")
    add(parser, "limit", "how many at most", type=int, default=30)


def run_list(arguments: argparse.Namespace, output: Output) -> None:
    """List the initialisations on the Hub."""
    from lora_da_hf.hub import list_inits

    found = list_inits(base_model=arguments.base_model, author=arguments.author, limit=arguments.limit)
    items = [_facts(info) for info in found]
    rows = [[str(value or "") for value in item.values()] for item in items]
    text = "\n".join(in_columns(rows, [name.replace("_", " ") for name in items[0]])) if items else "Nothing found."
    output.result({"initialisations": items}, bare=[info.id for info in found], text=text)


def _facts(info: ModelInfo) -> dict[str, Any]:
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    facts: Any = card.get("lora_da")
    return {
        "repo_id": info.id,
        "commit": info.sha,
        "private": info.private,
        "base_model": card.get("base_model"),
        "rank": facts.get("max_rank") if isinstance(facts, dict) else None,
    }
