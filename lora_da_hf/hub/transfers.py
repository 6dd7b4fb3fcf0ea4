"""Publishing, finding and fetching initialisations on the Hub: complete and checked, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from lora_da_hf.artifacts.folders import LICENSE_FILES, PLOT_FILE, TAGS
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, STATISTICS_FILE
from lora_da_hf.errors import ArtifactError, HubError, LoRADAError

if TYPE_CHECKING:
    from lora_da_hf.artifacts.store import StoredInit

_NEUTRAL = (".gitattributes", ".gitignore", *LICENSE_FILES)
"""What a repository may hold before its first initialisation."""
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "the repository is gated. Accept its conditions on its page, and log in with `hf auth login`."),
    (RepositoryNotFoundError, "there is none, or your token may not read it. Check the name, and `hf auth login`."),
    (RevisionNotFoundError, "the repository has no such branch, tag or commit. Look at its history on its page."),
    (OfflineModeIsEnabled, "the network is off (HF_HUB_OFFLINE), and this needs the Hub. Unset it and try again."),
    (HTTPError, "the Hub could not be reached, or broke off. Check the network and HF_ENDPOINT, or work offline."),
    (LocalEntryNotFoundError, "the cache does not hold all of it. Pull it once with the network on."),
)
"""What the client raises, most specific first."""


@contextlib.contextmanager
def hub_errors(doing: str) -> Generator[None]:
    """Turn what the client raises while ``doing`` something into a `HubError` that says why, and what you can do."""
    try:
        yield
    except LoRADAError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{doing} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    refusal = next((cause for cause in causes if type(cause) is HfHubHTTPError), None)
    if refusal is None:
        known = (reason for kind, reason in _REASONS if any(isinstance(cause, kind) for cause in causes))
        return next(known, str(error).strip() or type(error).__name__)
    status = refusal.response.status_code
    if status == 412:
        return "somebody else pushed meanwhile. Look at what changed, and push again on top of it."
    if status in (401, 403):
        return f"your token does not allow it ({status}). Log in with one that does: `hf auth login`."
    return f"the Hub answered {status} ({refusal.server_message})."


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

    stored, of_base_name = with_base_name(load_init(folder), facts.get("base_model"))
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
        others = names & {"training_args.bin"} if MANIFEST_FILE in names else names - set(_NEUTRAL)
        if others:
            raise HubError(f"{repo_id} holds {min(others)}, which a push would take over. Push to another.")
        licences = [name for name in LICENSE_FILES if (stored.folder / name).is_file()]
        in_folder = (*stored.manifest.files, MANIFEST_FILE, *licences)
        files: dict[str, Any] = {**{name: stored.folder / name for name in in_folder}, **of_base_name, **page}
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


def pull_init(
    repo_id: str,
    *,
    revision: str | None = None,
    statistics: bool = True,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> StoredInit:
    """Fetch an initialisation from the Hub into the client's cache, and check it there.

    The manifest comes first, and then exactly the files that it lists. A file that is damaged in the cache is fetched
    once more. With the network on, nothing is taken from the cache that your token may not read now. `apply_init`
    compares the base model.

    Args:
        repo_id: Owner and name.
        revision: Branch, tag or commit; None: main.
        statistics: Whether to fetch the statistics, full or leading, if there are any. `apply_init` needs none of them.
        cache_dir: The client's cache, which may be read-only if it holds everything; None: its default.
        local_files_only: Use the cache and no network, as ``HF_HUB_OFFLINE=1`` does.
        token, endpoint: As in `huggingface_hub.HfApi`.

    Raises:
        HubError: if the repository or revision cannot be read, or the network is off and the cache incomplete.
        ArtifactError: if anything in it is not as the manifest says.
    """
    from lora_da_hf.artifacts.store import load_init, load_manifest  # with torch, which a list does without

    offline = local_files_only or is_offline_mode()
    api = HfApi(endpoint=endpoint, token=token, library_name="lora_da_hf")

    def fetch(*, force: bool) -> StoredInit:
        how: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": offline, "force_download": force}
        folder = Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=[MANIFEST_FILE], **how))
        manifest = load_manifest(folder)
        left_out = () if statistics else (*manifest.statistics_files, *manifest.leading_files)
        wanted = [MANIFEST_FILE, *sorted(set(manifest.files) - set(left_out))]
        api.snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted, **how)
        return load_init(folder, statistics=statistics, alone=False)

    with hub_errors(f"Pulling {repo_id}{f'@{revision}' if revision else ''}"):
        if not offline:
            api.auth_check(repo_id)  # the client would use the cache of what you may not read
            found = api.model_info(repo_id, revision=revision).siblings or ()
            if MANIFEST_FILE not in {sibling.rfilename for sibling in found}:
                raise HubError(f"{repo_id} has no {MANIFEST_FILE}, so it is not an initialisation. Check the name.")
        try:
            stored = fetch(force=False)
        except ArtifactError:  # the cache may hold a damaged copy
            if offline:
                raise
            stored = fetch(force=True)
    return dataclasses.replace(stored, source=f"{repo_id}@{stored.folder.name}")


def list_inits(
    *,
    base_model: str | None = None,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> list[ModelInfo]:
    """List the initialisations on the Hub that the token may see: all, or those for a base, or of an author.

    Nothing that their cards say is checked. ``card_data["lora_da"]`` has the ranks.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    tags = [*TAGS[-2:], *([f"base_model:adapter:{base_model}"] if base_model else [])]
    api = HfApi(endpoint=endpoint, token=token, library_name="lora_da_hf")
    with hub_errors("Listing initialisations"):
        get_session().head(api.endpoint, timeout=10)  # the client's list goes on trying for long without a network
        return list(api.list_models(filter=tags, author=author, limit=limit, full=True, cardData=True))
