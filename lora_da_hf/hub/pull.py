"""Finding initialisations on the Hub, and fetching one: complete and checked, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import get_session

from lora_da_hf.artifacts.folders import TAGS
from lora_da_hf.artifacts.manifest import MANIFEST_FILE
from lora_da_hf.errors import ArtifactError, HubError
from lora_da_hf.hub.client import hub_errors

if TYPE_CHECKING:
    from lora_da_hf.artifacts.store import StoredInit


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
