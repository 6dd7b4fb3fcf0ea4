"""`lora-da push`, `lora-da pull` and `lora-da list`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_da_hf.cli.flags import Flags, check_loading, facts_of_card, load_base_model, positive
from lora_da_hf.cli.output import Output, aligned
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import in_columns

_SHORT = 12


def push_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da push`."""
    flags = Flags()
    flags.folder()
    flags.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there")
    flags.flag("public", action="store_true", help="let everybody see it (default: private)")
    flags.flag("card", type=Path, metavar="FILE", help="a card of your own (default: as `lora-da card` renders it)")
    flags.facts_of_card()
    flags.flag("create_pr", action="store_true", help="open a pull request instead of writing to the branch")
    flags.flag("revision", help="branch to write to (default: main)")
    flags.flag("parent_commit", help="refuse if the branch is not at this commit")
    flags.flag("commit_message", help="message of the commit")
    return flags


def run_push(arguments: argparse.Namespace, output: Output) -> None:
    """Publish a stored initialisation."""
    from lora_da_hf.hub import push_init

    _progress(output)
    pushed = push_init(
        arguments.folder,
        arguments.repo_id,
        private=not arguments.public,
        create_pr=arguments.create_pr,
        parent_commit=arguments.parent_commit,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        card=_read_card(arguments.card) if arguments.card is not None else None,
        **facts_of_card(arguments),
    )
    names = ("url", "repo_id", "commit", "pull_request_url", "private")
    values = {name: getattr(pushed, name) for name in (*names, "changed")}
    if not pushed.changed:
        output.message("The repository holds these files already, so nothing was committed.")
    rows = [(name.replace("_", " "), str(value)) for name, value in values.items() if value is not None]
    output.result(values, bare=f"{pushed.repo_id}@{pushed.commit}", text=aligned(rows))


def _read_card(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"{file}, given as --card, is not a file. Name a Markdown file.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}, given as --card, is not UTF-8 ({error}). Save it as UTF-8.") from error


def pull_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da pull`."""
    flags = Flags()
    flags.add_argument("repo_id", metavar="USER/NAME[@REVISION]", help="repository on the Hub")
    flags.flag("revision", help="branch, tag or commit; the same as behind an @")
    flags.loaded_base_model("and refuse if it was computed for another one")
    flags.flag("cache_dir", help="where it is kept (default: the Hub's cache)")
    flags.flag("local_dir", type=Path, metavar="FOLDER", help="a new folder for a copy of one's own")
    flags.flag("local_files_only", action="store_true", help="use what is in the cache, and do not connect")
    return flags


def run_pull(arguments: argparse.Namespace, output: Output) -> None:
    """Fetch and check an initialisation."""
    from lora_da_hf.hub import pull_init

    _progress(output)
    check_loading(arguments)
    repo_id, revision = _named(arguments.repo_id, arguments.revision)

    def load_base(peft_config: dict[str, Any]) -> Any:
        return load_base_model(arguments, output, peft_config)

    pulled = pull_init(
        repo_id,
        revision=revision,
        base_model=None if arguments.base_model is None else load_base,
        cache_dir=arguments.cache_dir,
        local_dir=arguments.local_dir,
        local_files_only=arguments.local_files_only,
    )
    values = {"folder": str(pulled.folder), "repo_id": repo_id, "commit": pulled.source.rpartition("@")[2]}
    output.result(values, bare=str(pulled.folder), text=aligned(list(values.items())))


def _named(name: str, revision: str | None) -> tuple[str, str | None]:
    """Take ``user/name@revision`` apart.

    Raises:
        ConfigError: if there is nothing behind the @, or two revisions are given.
    """
    repo_id, at, behind = name.partition("@")
    if (at and not behind) or revision == "":
        raise ConfigError(f"{name!r} names an empty revision. Write a branch, tag or commit, or leave it out.")
    if at and revision is not None:
        raise ConfigError(f"{name!r} names a revision, and --revision={revision} another. Give one of them.")
    return repo_id, behind or revision


def list_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da list`."""
    flags = Flags()
    flags.flag("base_model", metavar="MODEL", help="those for this base model")
    flags.flag("author", help="those of this user or organisation")
    flags.flag("limit", type=positive, default=30, help="how many at most (default: 30)")
    return flags


def run_list(arguments: argparse.Namespace, output: Output) -> None:
    """List initialisations on the Hub."""
    from lora_da_hf.hub import list_inits

    found = list_inits(base_model=arguments.base_model, author=arguments.author, limit=arguments.limit)
    names = ("repo_id", "commit", "private", "base_model", "rank", "tags")
    items: list[dict[str, Any]] = [{name: getattr(item, name) for name in names} for item in found]
    rows = [
        [
            str(item["repo_id"]),
            str(item["commit"] or "")[:_SHORT],
            "private" if item["private"] else "public",
            str(item["base_model"] or ""),
            str(item["rank"] or ""),
        ]
        for item in items
    ]
    text = "\n".join(in_columns(["repository", "commit", "", "base model", "rank"], rows)) if rows else "Nothing found."
    output.result({"initialisations": items}, bare=[str(item["repo_id"]) for item in items], text=text)


def _progress(output: Output) -> None:
    if not output.shows_progress:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
