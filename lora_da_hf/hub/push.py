"""Publishing an initialisation: one commit with all of it, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from lora_da_hf.artifacts.card_files import PLOTS
from lora_da_hf.artifacts.fingerprint import is_repo_id
from lora_da_hf.artifacts.folders import LICENSE_FILES
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, SCHEMA_VERSION, STATISTICS_SHARD
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import CardError, ConfigError, HubError, LoRADAError
from lora_da_hf.hub.base import base_facts
from lora_da_hf.hub.client import check_tree, hub_errors, make_api
from lora_da_hf.hub.page import license_of, own_page, render_page

SCHEMA_TAG = f"schema-v{SCHEMA_VERSION}"

_MAIN = "main"


@dataclass(frozen=True, kw_only=True)
class PushedInit:
    """Where an initialisation was published.

    Attributes:
        repo_id: Owner and name.
        url: Of the commit, for a browser.
        commit: Its hash.
        pull_request_url: If a pull request was asked for.
        tag: What points to the commit now; None for a pull request and for branches other than main.
        changed: Whether there was anything to commit.
        private: Whether the repo is private.
    """

    repo_id: str
    url: str
    commit: str
    pull_request_url: str | None
    tag: str | None
    changed: bool
    private: bool


def push_init(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    parent_commit: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    hardware: str | None = None,
    notes: Sequence[str] = (),
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> PushedInit:
    """Publish an initialisation on the Hub.

    The folder passes every check of `load_init`, and the card is rendered, before anything leaves the machine. The repo
    is made if there is none. Everything goes into one commit, the card and the plots that it shows included, and a
    LICENSE or NOTICE that lies in the folder; if nothing changed, there is none. A large file that an interrupted push
    already sent is not sent again.

    Args:
        folder: What an initialisation wrote.
        repo_id: Owner and name; without an owner, a repo of whoever the token belongs to.
        private: Whether the repo must be private. A new one is made as asked for; if it turns out otherwise, or one
            that is there is not as asked for, this is an error.
        create_pr: Make a pull request instead of a commit.
        parent_commit: Commit only on top of this one; None: of the one that is the newest now.
        revision: The branch, which must exist, so it cannot be one of a new repo; None: main.
        commit_message: None: one that names the base model.
        card: Text of a card of your own, whose metadata says the licence; None: `render_card` writes one, with the
            facts that follow.
        license: As for `render_card`; None: that of the base model on the Hub.
        license_name: As for `render_card`; None: the base model's.
        license_link: As for `render_card`, and of a file it must be in the folder; None: the base model's.
        base_model: As for `render_card`.
        datasets: As for `render_card`.
        language: As for `render_card`.
        hardware: As for `render_card`.
        notes: As for `render_card`.
        token: None: the one of the environment or of `hf auth login`.
        endpoint: None: ``HF_ENDPOINT``, or huggingface.co.

    Raises:
        ArtifactError: if the folder is not a valid initialisation, or what arrived is not what was sent.
        CardError: if the card is malformed, shows a plot or names a licence file that is not there, or is given
            together with facts for one.
        ConfigError: if the parent commit or the revision is empty, or the name is none that the Hub allows.
        HubError: if a public repo is asked for without a known licence, the repo is private or public against the wish,
            a new one should get another branch than main, it holds something else than an initialisation, somebody else
            pushed meanwhile, or the Hub refuses or cannot be reached. If a repo was made by then, the error says so.
    """
    for name, value in (("parent_commit", parent_commit), ("revision", revision)):
        if value == "":
            raise ConfigError(f"{name} is empty. Give one, or leave it out.")
    if not is_repo_id(repo_id):
        raise ConfigError(f"repo_id={repo_id!r} is no name of a repository on the Hub. Give one such as user/name.")
    stored = load_init(folder)
    api = make_api(token=token, endpoint=endpoint)
    licence = {"license": license, "license_name": license_name, "license_link": license_link}
    facts = {"datasets": datasets, "language": language, "hardware": hardware, "notes": notes}
    with hub_errors(f"Pushing {repo_id}"):
        repo_id = _with_owner(api, repo_id)
        base = base_facts(api, stored, base_model, with_license=card is None)
        if card is None:
            licence = base.license_facts(licence)
            _check_license_link(stored.folder, licence["license_link"])
            named = base.name or stored.manifest.base_model.name_or_path
            missing = f"the Hub names none for its base {named!r}. Pass license=... (--license)"
            page = render_page(
                stored, repo_id=repo_id, base_model=base_model, base_license=base.license, **licence, **facts
            )
        else:
            _refuse_facts({**licence, **facts})
            page = own_page(stored, card)
            licence = {"license": license_of(card)}
            missing = "your card names none. Say it in the card's metadata"
        if licence["license"] is None and not private:
            raise HubError(f"A public initialisation needs a licence, and {missing}, or push it privately.")
        is_new = not api.repo_exists(repo_id)
        if is_new and revision not in (None, _MAIN):
            raise HubError(
                f"{repo_id} is not there yet, and a new repo has no branch but main. Push without a revision first, "
                f"and make the branch {revision!r} then."
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    left = f"The repo {repo_id} was made by this push and stays: push again, or delete it on its page if it is empty."
    with _adding(left if is_new else ""), hub_errors(f"Pushing {repo_id}"):
        head = api.model_info(repo_id, revision=revision, files_metadata=True)
        _check_visibility(head, private=private)
        _check_replaceable(head)
        if parent_commit is not None and not create_pr and not str(head.sha).startswith(parent_commit):
            raise HubError(
                f"{repo_id} is at {head.sha}, not at {parent_commit}: somebody else pushed meanwhile. Look at what "
                "changed, and push again on top of it."
            )
        licences = [name for name in LICENSE_FILES if (stored.folder / name).is_file()]
        files = {name: stored.folder / name for name in (*stored.manifest.files, MANIFEST_FILE, *licences)}
        commit = api.create_commit(
            repo_id,
            [*_additions({**files, **page}), *_deletions(head, {**files, **page})],
            commit_message=commit_message or _message(base.name),
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit or head.sha,
        )
    made = f"The commit {commit.oid} is on the Hub all the same."
    with _adding(made), hub_errors(f"Checking what was pushed to {repo_id}"):
        pushed = api.model_info(repo_id, revision=commit.oid, files_metadata=True)
        _check_visibility(pushed, private=private)
        check_tree(stored.manifest, pushed)
        tagged = not create_pr and revision in (None, _MAIN) and _move_tag(api, repo_id, commit.oid)
    return PushedInit(
        repo_id=repo_id,
        url=commit.commit_url,
        commit=commit.oid,
        pull_request_url=commit.pr_url,
        tag=SCHEMA_TAG if tagged else None,
        changed=commit.oid != head.sha,
        private=bool(pushed.private),
    )


@contextlib.contextmanager
def _adding(sentence: str) -> Generator[None]:
    """Add to an error what is on the Hub all the same."""
    try:
        yield
    except LoRADAError as error:
        raise type(error)(f"{error} {sentence}".rstrip()) from error


def _refuse_facts(facts: Mapping[str, Any]) -> None:
    given = [name for name, value in facts.items() if value]
    if given:
        raise CardError(
            f"A card of your own is given, and {', '.join(given)} too, which would change nothing on it. Write that on "
            "the card, or leave the card out."
        )


def _with_owner(api: HfApi, repo_id: str) -> str:
    """Return the whole name of a repo: without an owner it is one of whoever the token belongs to."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _message(base: str | None) -> str:
    return f"LoRA-DA initialisation for {base}" if base else "LoRA-DA initialisation"


def _check_license_link(folder: Path, link: str | None) -> None:
    if link is None or link.startswith("https://"):
        return
    if link not in LICENSE_FILES or not (folder / link).is_file():
        raise CardError(
            f"license_link={link!r} is no file that goes with {folder}. Put the text there as {LICENSE_FILES[0]}, or "
            "give an https address."
        )


def _check_visibility(info: ModelInfo, *, private: bool) -> None:
    if private and not info.private:
        raise HubError(
            f"{info.id} is public, and private=True was asked for. Make it private in its settings, or pass "
            "private=False (--public) if everybody may read it."
        )
    if info.private and not private:
        raise HubError(
            f"{info.id} is private, and private=False (--public) was asked for, which only a new repo is made by. Make "
            "it public in its settings first, or push it privately."
        )


def _check_replaceable(info: ModelInfo) -> None:
    """Refuse a repo that holds anything but an initialisation: a trained adapter, a model, or somebody's card."""
    names = {sibling.rfilename for sibling in info.siblings or ()}
    others = sorted(names - {".gitattributes", ".gitignore", *LICENSE_FILES})
    if others and MANIFEST_FILE not in names:
        raise HubError(
            f"{info.id} holds something else than an initialisation ({others[0]}), which a push would write over or "
            "stand beside. Push to another repo."
        )


def _additions(files: Mapping[str, Path | bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]


def _deletions(head: ModelInfo, files: Collection[str]) -> list[CommitOperationDelete]:
    """Delete what an earlier push left in the repo and this one has not: shards of statistics and plots."""
    names = [sibling.rfilename for sibling in head.siblings or ()]
    stale = [name for name in names if (STATISTICS_SHARD.fullmatch(name) or name in PLOTS) and name not in files]
    return [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]


def _move_tag(api: HfApi, repo_id: str, commit: str) -> bool:
    """Let the schema's tag point to a commit, unless somebody pushed on top of it meanwhile."""
    refs = api.list_repo_refs(repo_id)
    if commit not in [branch.target_commit for branch in refs.branches if branch.name == _MAIN]:
        return False
    current = {tag.name: tag.target_commit for tag in refs.tags}.get(SCHEMA_TAG)
    if current != commit:
        if current is not None:
            api.delete_tag(repo_id, tag=SCHEMA_TAG)
        api.create_tag(repo_id, tag=SCHEMA_TAG, revision=commit)
    return True
