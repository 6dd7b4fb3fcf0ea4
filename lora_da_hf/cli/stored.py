"""What is done with a stored initialisation: `show`, `verify`, `card`, `refit`, `export`, `push`, `pull` and `list`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_da_hf.artifacts.folders import CardFacts
from lora_da_hf.cli.verbs import FOLDER, Output, argument, flag, flags_of, in_lines, read, verb
from lora_da_hf.config import FREE_IN_REFIT
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import in_columns, kind_of
from lora_da_hf.training.arguments import PREFIX, LoRADAArguments, ModelArguments, setting_of_flag

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


@verb("my-init", FOLDER)
def show(arguments: argparse.Namespace, output: Output) -> None:
    """Show what is in a stored initialisation."""
    from lora_da_hf.artifacts.store import load_init

    manifest = load_init(arguments.folder).manifest
    report, base = manifest.report, manifest.base_model
    modules = Counter(kind_of(layer.name) for layer in report.layers)
    values = {
        "folder": str(arguments.folder),
        "base_model": base.name_or_path,
        "base_revision": base.revision,
        "created": manifest.created,
        "max_rank": max(layer.max_rank for layer in report.layers),
        "modules": dict(modules),
        "has_statistics": bool(manifest.statistics_files) or ("leading" if manifest.leading_files else False),
        "bytes": manifest.num_bytes,
    }
    counted = ", ".join(f"{name} x {count}" for name, count in modules.items())
    text = f"{in_lines({**values, 'modules': counted})}\n\n{report}"
    output.result({**values, **report.to_dict()}, bare=[layer.name for layer in report.layers], text=text)


@verb(
    "my-init --base_model HuggingFaceTB/SmolLM2-135M",
    FOLDER,
    flag("base_model", "load this model and check that the initialisation belongs to it", metavar="MODEL"),
    flag("model_revision", "its branch, tag or commit (default: main)", default="main"),
    flag(
        "dtype",
        "its precision (default: as stored)",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    flag("trust_remote_code", "run model code that comes with it"),
)
def verify(arguments: argparse.Namespace, output: Output) -> None:
    """Check every file of a stored initialisation, and that it belongs to a base model."""
    from lora_da_hf.artifacts.store import check_base_model, load_init
    from lora_da_hf.hub.cards import base_class_name
    from lora_da_hf.pipeline.base_model import base_model_facts
    from lora_da_hf.training.text import load_base

    stored = load_init(arguments.folder)
    if arguments.base_model is not None:
        output.message(f"Loading {arguments.base_model}")
        kind = base_class_name(stored.peft_config["task_type"] or "CAUSAL_LM")
        loading = {name: getattr(arguments, name) for name in ("model_revision", "dtype", "trust_remote_code")}
        model = load_base(arguments.base_model, ModelArguments(**loading), kind)
        for note in check_base_model(stored, base_model_facts(model)):
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


@verb(
    "my-init --license apache-2.0 --datasets gsm8k --language en --output card",
    FOLDER,
    flag("output", "new folder for the card and its plot (default: the card to stdout)", type=Path, metavar="FOLDER"),
    flag("repo_id", "where it is published", metavar="USER/NAME"),
    flags_of(CardFacts),
)
def card(arguments: argparse.Namespace, output: Output) -> None:
    """Render the card of a stored initialisation, and its plot."""
    from lora_da_hf.artifacts.store import load_init, with_base_name
    from lora_da_hf.hub.cards import render_card, render_page

    facts = {**vars(read(CardFacts, arguments)), "repo_id": arguments.repo_id}
    stored, _ = with_base_name(load_init(arguments.folder), facts["base_model"])
    if arguments.output is None:
        text = render_card(stored, **facts).rstrip("\n")
        output.result({"card": text}, bare=text, text=text)
        return
    if arguments.output.exists():
        raise ConfigError(f"{arguments.output} is there already. Name a new folder.")
    page = render_page(stored, **facts)
    arguments.output.mkdir(parents=True)
    for name, content in page.items():
        (arguments.output / name).write_bytes(content)
    written = [str(arguments.output / name) for name in page]
    output.result({"files": written}, bare=written, text="\n".join(f"Written: {path}" for path in written))


def _settings_of_refit(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting. Those that are not given stay as they were, and not all of them can change."""
    flags_of(LoRADAArguments)(parser)
    for action in parser._actions:
        if action.dest.startswith(PREFIX):
            is_free = action.dest.removeprefix(PREFIX) in FREE_IN_REFIT - {"step_size"}
            action.help = f"{action.help} (default: as stored)" if is_free else argparse.SUPPRESS
            action.default = argparse.SUPPRESS


@verb(
    "my-init my-init-damped --rank 4 --da_input_damping 0.3*mean",
    FOLDER,
    argument("output", "OUTPUT", "folder for the new one; if FOLDER, its statistics stay, its losses go", type=Path),
    flag("rank", "rank of the new adapter, at most the stored one or --da_max_rank", type=int),
    flag("step_size", "how far step 0 goes (default: as the stored steps say)", type=float),
    _settings_of_refit,
)
def refit(arguments: argparse.Namespace, output: Output) -> None:
    """Make another initialisation: another rank, or other settings from stored statistics."""
    from lora_da_hf.pipeline.refit import refit_init

    folder = str(arguments.output)
    given = {name.removeprefix(PREFIX): value for name, value in vars(arguments).items() if name.startswith(PREFIX)}
    made = refit_init(
        arguments.folder,
        arguments.output,
        config={name: setting_of_flag(name, value) for name, value in given.items()} or None,
        rank=arguments.rank,
        step_size=arguments.step_size,
        progress=output.shows_progress,
    )
    for note in made.report.notes:
        output.message(f"Note: {note}.")
    output.result({"folder": folder}, bare=folder, text=f"Written to {folder}")


@verb(
    "my-init eva.safetensors --to eva",
    FOLDER,
    argument("output", "OUTPUT", "new file", type=Path),
    flag(
        "to",
        "whose format: PEFT's starts, or llama.cpp's importance matrix",
        choices=("eva", "corda", "lora_ga", "imatrix"),
        required=True,
    ),
)
def export(arguments: argparse.Namespace, output: Output) -> None:
    """Write stored statistics as a file that PEFT's EVA, CorDA and LoRA-GA or llama.cpp read."""
    from lora_da_hf.pipeline.export import export_init

    left_out = export_init(arguments.folder, arguments.output, to=arguments.to)
    if left_out:
        output.message(f"{len(left_out)} layers have no place in this format: {', '.join(left_out)}")
    path = str(arguments.output)
    output.result({"file": path, "left_out": left_out}, bare=path, text=f"Written to {path}")


@verb(
    "my-init user/my-init --create_pr",
    FOLDER,
    argument("repo_id", "USER/NAME", "repository on the Hub; it is made if it is not there"),
    flag("public", "let everybody see it (default: private)"),
    flags_of(CardFacts),
    flag("create_pr", "open a pull request instead of writing to the branch"),
    flag("revision", "branch to write to (default: main)", metavar="BRANCH"),
    flag("commit_message", "message of the commit", metavar="TEXT"),
)
def push(arguments: argparse.Namespace, output: Output) -> None:
    """Publish a stored initialisation on the Hub, private unless asked otherwise."""
    from lora_da_hf.hub import push_init

    pushed = push_init(
        arguments.folder,
        arguments.repo_id,
        private=not arguments.public,
        create_pr=arguments.create_pr,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        **vars(read(CardFacts, arguments)),
    )
    repo_id = pushed.repo_url.repo_id
    values = {"url": pushed.commit_url, "repo_id": repo_id, "commit": pushed.oid, "pull_request_url": pushed.pr_url}
    output.result(values, bare=f"{repo_id}@{pushed.oid}")


@verb(
    "user/my-init@v1 --quiet",
    argument("repo_id", "USER/NAME[@REVISION]", "repository on the Hub; main, unless you name a branch, tag or commit"),
)
def pull(arguments: argparse.Namespace, output: Output) -> None:
    """Fetch an initialisation from the Hub into the client's cache, and check it."""
    from lora_da_hf.hub import pull_init

    repo_id, _, revision = arguments.repo_id.partition("@")
    pulled = pull_init(repo_id, revision=revision or None)
    folder = str(pulled.folder)
    output.result({"folder": folder, "repo_id": repo_id, "commit": pulled.source.rpartition("@")[2]}, bare=folder)


@verb(
    "--base_model HuggingFaceTB/SmolLM2-135M --limit 20",
    flag("base_model", "those for this base model", metavar="MODEL"),
    flag("author", "those of this user or organisation", metavar="NAME"),
    flag("limit", "how many at most", type=int, default=30),
)
def list_(arguments: argparse.Namespace, output: Output) -> None:
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
