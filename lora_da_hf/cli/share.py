"""`lora-da push`, `lora-da pull` and `lora-da list`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_da_hf.cli.flags import add, add_card, add_folder, card_of
from lora_da_hf.cli.output import Output
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import in_columns

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def push_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lora-da push`."""
    add_folder(parser)
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there")
    add(parser, "public", "let everybody see it (default: private)")
    add(parser, "card", "a card of your own (default: as `lora-da card` renders it)", type=Path, metavar="FILE")
    add_card(parser)
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
        **card_of(arguments),
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
