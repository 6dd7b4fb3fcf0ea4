"""Publishing an initialisation: one commit with all of it, or none."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from lora_da_hf.artifacts.schema import MANIFEST_FILE, SCHEMA_VERSION, Manifest
from lora_da_hf.artifacts.statistics_store import check_statistics
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.errors import HubError
from lora_da_hf.hub.cards import CARD_FILE, card_plots, render_card
from lora_da_hf.hub.client import check_tree, hub_errors, make_api

SCHEMA_TAG = f"schema-v{SCHEMA_VERSION}"

_OWN_FILES = "lora_da_"
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


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What the Hub says of a base model: its licence, if it names one, and whether it is gated."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False

    def license_facts(self) -> dict[str, str | None]:
        """Return what a card says of the licence; name and link go with a licence called other."""
        names = ("license", "license_name", "license_link") if self.license == "other" else ("license",)
        return {name: getattr(self, name) for name in names}


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
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> PushedInit:
    """Publish an initialisation on the Hub.

    The folder passes every check of `load_init` before anything leaves the machine. The repo is made if there is none.
    Everything goes into one commit; if nothing changed, there is none. A large file that an interrupted push already
    sent is not sent again.

    Args:
        folder: What an initialisation wrote.
        repo_id: Owner and name.
        private: Whether the repo must be private. A new one is made so; if it turns out public, this is an error.
        create_pr: Make a pull request instead of a commit.
        parent_commit: Commit only on top of this one; None: of the one that is the newest now.
        revision: The branch, which must exist; None: main.
        commit_message: None: one that names the base model.
        card: Text of the model card; None: rendered from the initialisation.
        license: Of the initialisation; None: that of the base model on the Hub.
        token: None: the one of the environment or of `hf auth login`.
        endpoint: None: ``HF_ENDPOINT``, or huggingface.co.

    Raises:
        ArtifactError: if the folder is not a valid initialisation, or what arrived is not what was sent.
        HubError: if a public repo is asked for without a known licence, the repo is public against the wish, somebody
            else pushed meanwhile, or the Hub refuses or cannot be reached.
    """
    stored = load_init(folder)
    check_statistics(stored.folder, stored.manifest)
    api = make_api(token=token, endpoint=endpoint)
    doing = f"Pushing {repo_id}"
    with hub_errors(doing):
        base = _base_facts(api, stored.manifest)
        _check_license(stored.manifest, base, license or base.license, private=private)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id, revision=revision, files_metadata=True)
        _check_private(head, private=private)
        with tempfile.TemporaryDirectory() as extra:
            described = base.license_facts() if license in (None, base.license) else {"license": license}
            files = _init_files(stored) | _card_files(stored, Path(extra), card, repo_id=repo_id, **described)
            commit = api.create_commit(
                repo_id,
                [*_additions(files), *_deletions(head, files)],
                commit_message=commit_message or _message(stored.manifest),
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent_commit or head.sha,
            )
        pushed = api.model_info(repo_id, revision=commit.oid, files_metadata=True)
        _check_private(pushed, private=private)
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


def _base_facts(api: HfApi, manifest: Manifest) -> BaseFacts:
    """Ask the Hub for licence and gate of the base; of one that it does not know, such as a folder, it says nothing."""
    name = manifest.base_model["name_or_path"]
    if not name:
        return BaseFacts()
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        return BaseFacts()
    except HFValidationError:
        warnings.warn(
            f"The base model is called {name!r}, which is no name on the Hub: it is published as it is, and nobody can "
            "find the base by it. Load the base by its name on the Hub before you initialise.",
            stacklevel=3,
        )
        return BaseFacts()
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    named = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    return BaseFacts(gated=bool(info.gated), **{key: text for key, text in named.items() if isinstance(text, str)})


def _check_license(manifest: Manifest, base: BaseFacts, license: str | None, *, private: bool) -> None:
    name = manifest.base_model["name_or_path"]
    if license is None and not private:
        raise HubError(
            f"A public initialisation needs a licence, and the Hub names none for its base {name!r}. Pass license=..., "
            "or push it privately."
        )
    if base.gated:
        warnings.warn(
            f"The base model {name!r} is gated: see whether its conditions let you share what was computed from it.",
            stacklevel=3,
        )


def _message(manifest: Manifest) -> str:
    name = manifest.base_model["name_or_path"]
    return f"LoRA-DA initialisation for {name}" if name else "LoRA-DA initialisation"


def _check_private(info: ModelInfo, *, private: bool) -> None:
    if private and not info.private:
        raise HubError(
            f"{info.id} is public, and private=True was asked for. Make it private in its settings, or pass "
            "private=False if everybody may read it."
        )


def _init_files(stored: StoredInit) -> dict[str, Path]:
    return {name: stored.folder / name for name in (*stored.manifest.files, MANIFEST_FILE)}


def _card_files(stored: StoredInit, extra: Path, card: str | None, **facts: Any) -> dict[str, Path]:
    """Write the card, and its plots if it is rendered here, into a folder of their own."""
    plots: dict[str, bytes] = {}
    if card is None:
        plots = card_plots(stored)
        card = render_card(stored, plots=plots, **facts)
    contents = {CARD_FILE: card.encode("utf-8"), **plots}
    for name, content in contents.items():
        (extra / name).write_bytes(content)
    return {name: extra / name for name in contents}


def _additions(files: dict[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]


def _deletions(head: ModelInfo, files: dict[str, Path]) -> list[CommitOperationDelete]:
    """Delete what an earlier initialisation in the repo had and this one has not, such as shards of statistics."""
    names = [sibling.rfilename for sibling in head.siblings or ()]
    stale = [name for name in names if name.startswith(_OWN_FILES) and name not in files]
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
