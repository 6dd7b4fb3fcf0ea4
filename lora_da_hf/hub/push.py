"""Publishing an initialisation: one commit with all of it, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from lora_da_hf.artifacts.folders import LICENSE_FILES, PLOT_FILE
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, STATISTICS_FILE
from lora_da_hf.errors import HubError
from lora_da_hf.hub.client import hub_errors

_NEUTRAL = (".gitattributes", ".gitignore", *LICENSE_FILES)
"""What a repository may hold before its first initialisation."""


def push_init(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **facts: Any,
) -> CommitInfo:
    """Publish an initialisation on the Hub.

    The folder passes every check of `load_init`, and the card is rendered, before anything is sent. A new repository is
    made if there is none. Everything goes into one commit: the files, the card, its plot, and a LICENSE or NOTICE that
    lies in the folder. If nothing changed, nothing is committed, and the newest commit is returned.

    Args:
        folder: What an initialisation wrote.
        repo_id: Owner and name; without an owner, a repository of whoever the token belongs to.
        private: Whether the repository must be private. A new one is made so; any other must be so.
        create_pr: Make a pull request instead of a commit.
        revision: The branch, which must exist; None: main.
        commit_message: None: one that names the base model.
        token, endpoint: As in `huggingface_hub.HfApi`.
        facts: See `CardFacts`. Without a ``license``, it is the base model's on the Hub. ``base_model`` is also put
            in place of a local folder's name in what is published.

    Raises:
        ArtifactError: if the folder is not a valid initialisation.
        ConfigError: if the Hub does not allow a name.
        HubError: if a public push has no licence, the repository is private or public against the wish or holds
            something else, somebody else pushed meanwhile, or the Hub refuses or cannot be reached.
    """
    from lora_da_hf.artifacts.store import load_init, with_base_name  # with torch, which a list does without
    from lora_da_hf.hub.cards import base_id_of, render_page

    stored, of_base_name = load_init(folder), dict[str, bytes]()
    if facts.get("base_model") not in (None, stored.manifest.base_model.name_or_path):
        stored, of_base_name = with_base_name(stored, facts["base_model"])
    api = HfApi(endpoint=endpoint, token=token, library_name="lora_da_hf")
    with hub_errors(f"Pushing {repo_id}"):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        base_id = base_id_of(stored.manifest.base_model, facts.get("base_model"))
        of_base = _licence_of_base(api, base_id)
        said = {name: value for name, value in facts.items() if value}
        said = said if "license" in said else {**of_base, **said}
        base_license = of_base.get("license_name") or of_base.get("license")
        page = render_page(stored, repo_id=repo_id, base_license=base_license, **said)
        if not private and "license" not in said:
            raise HubError("A public push needs a licence. Give license=... (--license), or push it privately.")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id, revision=revision)
        names = {sibling.rfilename for sibling in head.siblings or ()}
        if bool(head.private) != private:
            found, wanted = ("public", "private=True") if private else ("private", "private=False (--public)")
            raise HubError(
                f"{repo_id} is {found}, and you asked for {wanted}. Change that in its settings, or ask for {found}."
            )
        others = sorted(names - set(_NEUTRAL))
        if others and MANIFEST_FILE not in names:
            raise HubError(
                f"{repo_id} holds {others[0]} and no initialisation, and a push would take it over. Push to another."
            )
        licences = [name for name in LICENSE_FILES if (stored.folder / name).is_file()]
        files: dict[str, Any] = {
            name: stored.folder / name for name in (*stored.manifest.files, MANIFEST_FILE, *licences)
        }
        files |= {**of_base_name, **page}
        stale = [name for name in names - set(files) if STATISTICS_FILE.fullmatch(name) or name == PLOT_FILE]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(stale)),
            ],
            commit_message=commit_message or f"LoRA-DA initialisation{f' for {base_id}' if base_id else ''}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # so that nobody else's push is lost
        )


def _licence_of_base(api: HfApi, base_id: str | None) -> dict[str, str]:
    """Return the card's facts about the licence as the base model's own card has them."""
    try:
        info = api.model_info(base_id) if base_id else None
    except RepositoryNotFoundError:
        info = None
    said: dict[str, Any] = info.card_data.to_dict() if info is not None and info.card_data is not None else {}
    keys = ("license", "license_name", "license_link") if said.get("license") == "other" else ("license",)
    found = {key: said[key] for key in keys if isinstance(said.get(key), str)}
    if "license_link" in found and not found["license_link"].startswith("https://"):  # a file beside the base's card
        found["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{found['license_link']}"
    return found
