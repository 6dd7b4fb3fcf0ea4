"""Publishing an initialisation: one commit with all of it, or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

from lora_da_hf.artifacts.folders import CARD_FILE, LICENSE_FILES, PLOTS
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, STATISTICS_FILE
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.errors import ConfigError, HubError
from lora_da_hf.hub.cards import base_id_of, check_facts, render_page
from lora_da_hf.hub.client import hub_errors
from lora_da_hf.hub.plots import draw_plots

_NEUTRAL = (".gitattributes", ".gitignore", *LICENSE_FILES)
"""What a repository may hold before its first initialisation."""


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
    token: str | bool | None = None,
    endpoint: str | None = None,
    **facts: Any,
) -> CommitInfo:
    """Publish an initialisation on the Hub.

    The folder passes every check of `load_init`, and the card is rendered, before anything is sent. A new repository is
    made if there is none. Everything goes into one commit: the files, the card, its plots, and a LICENSE or NOTICE that
    lies in the folder. If nothing changed, nothing is committed, and the newest commit is returned.

    Args:
        folder: What an initialisation wrote.
        repo_id: Owner and name; without an owner, a repository of whoever the token belongs to.
        private: Whether the repository must be private. A new one is made so; any other must be so.
        create_pr: Make a pull request instead of a commit.
        parent_commit: Commit only on top of this one; None: of the one that is the newest now.
        revision: The branch, which must exist; None: main.
        commit_message: None: one that names the base model.
        card: Text of a card of your own, whose metadata says the licence; None: `render_card` writes one.
        token, endpoint: As in `huggingface_hub.HfApi`.
        facts: See `CardFacts`. Without a ``license``, it is the base model's on the Hub.

    Raises:
        ArtifactError: if the folder is not a valid initialisation.
        ConfigError: if a card is given together with facts for one, the parent commit or the revision is empty, or the
            Hub does not allow a name.
        HubError: if a public push has no licence, the repository is private or public against the wish or holds
            something else, somebody else pushed meanwhile, or the Hub refuses or cannot be reached.
    """
    if "" in (parent_commit, revision):
        raise ConfigError("parent_commit or revision is empty. Give one, or leave it out.")
    check_facts({**facts, "repo_id": repo_id})
    stored = load_init(folder)
    api = HfApi(endpoint=endpoint, token=token, library_name="lora_da_hf")
    with hub_errors(f"Pushing {repo_id}"):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        base_id = base_id_of(stored.manifest.base_model, facts.get("base_model"))
        of_base = _licence_of_base(api, base_id)
        page, license = _own_page(stored, card, facts) if card is not None else _page(stored, repo_id, of_base, facts)
        if license is None and not private:
            raise HubError("A public push needs a licence. Give license=... (--license), or push it privately.")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id, revision=revision)
        names = {sibling.rfilename for sibling in head.siblings or ()}
        _check_visibility(head, private=private)
        others = sorted(names - set(_NEUTRAL))
        if others and MANIFEST_FILE not in names:
            raise HubError(
                f"{repo_id} holds {others[0]} and no initialisation, and a push would take it over. Push to another."
            )
        licences = [name for name in LICENSE_FILES if (stored.folder / name).is_file()]
        files = {name: stored.folder / name for name in (*stored.manifest.files, MANIFEST_FILE, *licences)} | page
        stale = [name for name in names - set(files) if STATISTICS_FILE.fullmatch(name) or name in PLOTS]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(stale)),
            ],
            commit_message=commit_message or f"LoRA-DA initialisation{f' for {base_id}' if base_id else ''}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit or head.sha,
        )
        pushed = api.model_info(repo_id, revision=commit.oid)
        _check_visibility(pushed, private=private, left=f" The commit {commit.oid} is there already.")
    return commit


def _page(
    stored: StoredInit, repo_id: str, of_base: Mapping[str, str], facts: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Render the card and its plots; return files by name, and the licence that the card states."""
    given = {name: value for name, value in facts.items() if value}
    said: dict[str, Any] = {**of_base, **given} if "license" not in given else given
    link = said.get("license_link", "https://")
    if not link.startswith("https://") and not (link in LICENSE_FILES and (stored.folder / link).is_file()):
        raise ConfigError(f"license_link={link!r} is not in {stored.folder}. Put it there, or give an https address.")
    base_license = of_base.get("license_name") or of_base.get("license")
    return render_page(stored, repo_id=repo_id, base_license=base_license, **said), said.get("license")


def _own_page(stored: StoredInit, card: str, facts: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a card of the user's own with the plots that it shows, and the licence that it states."""
    given = [name for name, value in facts.items() if value]
    if given:
        raise ConfigError(f"{', '.join(given)} would not be on the card that you give. Write that on it yourself.")
    license = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    plots = draw_plots(stored.manifest.report) if any(name in card for name in PLOTS) else {}
    return {CARD_FILE: card.encode("utf-8"), **{name: plots[name] for name in plots if name in card}}, license


def _licence_of_base(api: HfApi, base_id: str | None) -> Mapping[str, str]:
    """Return the card's facts about the licence as the base model's own card has them."""
    try:
        info = api.model_info(base_id) if base_id else None
    except RepositoryNotFoundError:
        info = None
    if info is not None and info.gated:
        warnings.warn(
            f"The base model {base_id!r} is gated: see whether its conditions let you share what follows from it.",
            stacklevel=3,  # at the line that calls `push_init`
        )
    said: dict[str, Any] = info.card_data.to_dict() if info is not None and info.card_data is not None else {}
    keys = ("license", "license_name", "license_link") if said.get("license") == "other" else ("license",)
    found = {key: said[key] for key in keys if isinstance(said.get(key), str)}
    if "license_link" in found and not found["license_link"].startswith("https://"):  # a file beside the base's card
        found["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{found['license_link']}"
    return found


def _check_visibility(info: ModelInfo, *, private: bool, left: str = "") -> None:
    if bool(info.private) != private:
        found, wanted = ("public", "private=True") if private else ("private", "private=False (--public)")
        raise HubError(
            f"{info.id} is {found}, and you asked for {wanted}. Change that in its settings, or ask for {found}.{left}"
        )
