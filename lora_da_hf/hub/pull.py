"""Fetching an initialisation: complete and checked, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, hf_hub_url
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import WeakFileLock
from torch import nn

from lora_da_hf.artifacts.adapter_config import check_adapter_config
from lora_da_hf.artifacts.folders import atomic_folder, check_replaceable, remove_leftovers
from lora_da_hf.artifacts.manifest import (
    ADAPTER_CONFIG_FILE,
    MANIFEST_FILE,
    BaseModelFacts,
    FileEntry,
    Manifest,
    parse_manifest,
)
from lora_da_hf.artifacts.statistics_store import statistics_files
from lora_da_hf.artifacts.store import StoredInit, check_base_model, check_file, load_init
from lora_da_hf.errors import ArtifactError, ConfigError, HubError
from lora_da_hf.hub.client import check_manifest_size, check_tree, hub_errors, make_api
from lora_da_hf.pipeline.against_base import check_against_base
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.refit import is_cut, refit_init, was_cut

_CHECKED = "lora_da"
"""Folder for checked initialisations, beside the client's own ``blobs`` and ``snapshots`` of the repo."""

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a place that this process may not write to."""

LoadBase = Callable[[dict[str, Any]], nn.Module]
"""Loads a base model, given PEFT's configuration of the adapter that it is for."""

_T = TypeVar("_T")

_Put = Callable[[Path, Path], Any]
"""Copies or links a file of the cache to a second place."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A repo and how its files are fetched."""

    api: HfApi
    repo_id: str
    cache_dir: Path | None
    offline: bool

    def resolve(self, revision: str | None) -> ModelInfo:
        """Ask the Hub what a revision is now, and whether its files may be read, before the cache is looked at."""
        info = self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
        check_manifest_size(info)
        url = hf_hub_url(self.repo_id, MANIFEST_FILE, revision=info.sha, endpoint=self.api.endpoint)
        self.api.get_hf_file_metadata(url=url)
        return info

    def fetch(self, name: str, revision: str | None, check: Callable[[Path], _T]) -> _T:
        """Fetch a file and check it; a copy in the client's cache that was damaged is fetched once more.

        Args:
            name: Of the file.
            revision: Of the repo.
            check: Reads the file in the cache, of which the client compares the size alone, and raises `ArtifactError`.
        """
        try:
            return check(self._download(name, revision))
        except ArtifactError:
            if self.offline:
                raise
        return check(self._download(name, revision, again=True))

    def _download(self, name: str, revision: str | None, *, again: bool = False) -> Path:
        path = self.api.hf_hub_download(
            self.repo_id,
            name,
            revision=revision,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            force_download=again,
        )
        return Path(path)


def pull_init(
    repo_id: str,
    *,
    revision: str | None = None,
    rank: int | None = None,
    statistics: bool = True,
    base_model: nn.Module | BaseModelFacts | LoadBase | None = None,
    cache_dir: str | Path | None = None,
    local_dir: str | Path | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> StoredInit:
    """Fetch an initialisation from the Hub, and check it before it is used.

    The revision is resolved to a commit first. The manifest comes next, and with it the base model is compared, before
    anything large is downloaded. Then come exactly the files that the manifest lists, and every check of `load_init`,
    but for statistics that are left out. Files in the cache are hashed again. With the network off, all of them must be
    in the cache. With the network on,
    nothing is taken from the cache that the Hub does not let the token read now.

    Args:
        repo_id: Owner and name.
        revision: Branch, tag or commit; None: main.
        rank: Give an adapter of this rank, up to the stored one; None: as it was published.
        statistics: Whether the full statistics are fetched and checked too, if there are any. `apply_init` needs none;
            what else reads an initialisation refuses a folder that lacks them.
        base_model: The model that it will be used on, or its facts, or a function
            that loads it, which is given PEFT's configuration of the adapter; None: it is not compared. A DoRA adapter
            of another rank needs the model itself.
        cache_dir: The client's cache; None: its default. It may be read-only if it holds the checked folder, or if all
            files are there and ``local_dir`` is given; several processes then need a folder each.
        local_dir: Where to put the checked folder: a new or empty folder, or one with the same initialisation at any
            rank, which is replaced. None: in the cache, with hard links, so that it takes no space; another rank is cut
            there once.
        overwrite: Whether another initialisation at ``local_dir`` is replaced.
        local_files_only: Use the cache and no network, as ``HF_HUB_OFFLINE=1`` does.
        token: None: the one of the environment or of `hf auth login`.
        endpoint: None: ``HF_ENDPOINT``, or huggingface.co.

    Raises:
        HubError: if the repo or revision is not there or not readable, the cache is incomplete with the network off, or
            it cannot be written and has no checked folder.
        ArtifactError: if anything in it is not as the manifest says.
        BaseModelMismatchError: if it was computed for another base model.
        ConfigError: if the rank is above the stored one, the revision is empty, local_dir holds something else or
            another initialisation, a DoRA adapter is to get another rank without the base model itself, or a rank is to
            be cut without statistics.
    """
    if revision == "":
        raise ConfigError(
            f"The revision of {repo_id} is empty. Give a branch, tag or commit, or leave it out for main."
        )
    if rank is not None and not statistics:
        raise ConfigError(f"rank={rank} is cut from all of an initialisation. Leave statistics=False out.")
    if local_dir is not None:
        check_replaceable(Path(local_dir))
    source = _Source(
        api=make_api(token=token, endpoint=endpoint),
        repo_id=repo_id,
        cache_dir=Path(cache_dir) if cache_dir is not None else None,
        offline=local_files_only or is_offline_mode(),
    )
    doing = f"Pulling {repo_id}{f'@{revision}' if revision else ''}"
    with hub_errors(doing):
        info = None if source.offline else source.resolve(revision)
        path, manifest = _fetch_manifest(source, revision)
        commit = path.parent.name
        if info is not None:
            if commit != info.sha:
                raise HubError(f"{repo_id} changed while it was read: it was {info.sha}, now {commit}. Pull again.")
            check_tree(manifest, info)
        load = base_model if callable(base_model) and not isinstance(base_model, nn.Module) else None
        peft_config = {} if load is None else _fetch_peft_config(source, manifest, commit)
    base = load(peft_config) if load is not None else base_model
    _check_use(manifest, base, rank)  # pyright: ignore[reportArgumentType] - it is called no more
    model = base if isinstance(base, nn.Module) else None
    statistics = statistics or not statistics_files(manifest)
    with hub_errors(doing):
        checked = path.parents[2] / _CHECKED
        places = [Path(local_dir)] if local_dir is not None else _places(checked, commit, rank, statistics=statistics)
        put = _link if local_dir is None else shutil.copyfile
        with _locked(checked, commit, in_cache=local_dir is None) as refusal:
            for place in places if refusal is None else ():
                remove_leftovers(place)
            made = next((place for place in places if _is_made(place, manifest, rank, statistics=statistics)), None)
            folder = made or places[-1]
            if made is not None:
                if model is not None:
                    check_against_base(load_init(made, statistics=statistics), model)
            elif refusal is not None:
                raise HubError(
                    f"{doing} failed: {checked} cannot be written ({refusal.strerror}), and has no complete "
                    f"{folder.name}. Pull it once where that can be written, or to a folder of its own (local_dir)."
                ) from refusal
            elif local_dir is not None and not overwrite and _holds_another(folder, manifest):
                raise ConfigError(
                    f"{folder} holds another initialisation, which would be lost. Name a new folder, or pass "
                    "overwrite=True (--overwrite)."
                )
            elif rank is None:
                _collect(source, manifest, path, folder, put, model, statistics=statistics)
            else:
                with _whole(checked, commit, folder, in_cache=local_dir is None) as whole:
                    remove_leftovers(whole)
                    if not _is_made(whole, manifest, None):
                        _collect(source, manifest, path, whole, put, model)
                    refit_init(whole, folder, rank=rank, base_model=model)
    return dataclasses.replace(load_init(folder, statistics=statistics), source=f"{repo_id}@{commit}")


def _places(checked: Path, commit: str, rank: int | None, *, statistics: bool) -> list[Path]:
    """Return the folders of the cache that would do, the one to make last.

    What has no statistics has a folder of its own, so that none has to be replaced while another process reads it.
    """
    if rank is not None:
        return [checked / f"{commit}-rank-{rank}"]
    return [checked / commit, *([] if statistics else [checked / f"{commit}-without-statistics"])]


@contextlib.contextmanager
def _locked(checked: Path, commit: str, *, in_cache: bool) -> Generator[OSError | None]:
    """Keep other processes out of the checked folders of a commit, which needs a cache that can be written.

    A folder that is not in the cache is made without that. One in a read-only cache can be used and not be made.

    Yields:
        Why nothing can be made in the cache; None: it can, or need not be.
    """
    refusal = None
    with contextlib.ExitStack() as stack:
        try:
            checked.mkdir(exist_ok=True)
            stack.enter_context(WeakFileLock(checked / f"{commit}.lock"))
        except OSError as error:
            if in_cache and error.errno not in _READ_ONLY:
                raise
            refusal = error if in_cache else None
        yield refusal


@contextlib.contextmanager
def _whole(checked: Path, commit: str, target: Path, *, in_cache: bool) -> Generator[Path]:
    """Give the place for what a rank is cut from: in the cache, or beside the target and only as long as needed."""
    if in_cache:
        yield checked / commit
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.whole-"
    for left in target.parent.glob(glob.escape(prefix) + "*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as place:
        yield Path(place) / commit


def _fetch_manifest(source: _Source, revision: str | None) -> tuple[Path, Manifest]:
    """Fetch and check the manifest."""
    where = f"{MANIFEST_FILE} of {source.repo_id}"
    return source.fetch(MANIFEST_FILE, revision, lambda path: (path, parse_manifest(path.read_bytes(), source=where)))


def _fetch_peft_config(source: _Source, manifest: Manifest, commit: str) -> dict[str, Any]:
    """Fetch and check PEFT's configuration of the adapter, which is small."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / ADAPTER_CONFIG_FILE
        _place(source, commit, path, manifest.files[ADAPTER_CONFIG_FILE], shutil.copyfile)
        return check_adapter_config(path, manifest)


def _check_use(manifest: Manifest, base_model: nn.Module | BaseModelFacts | None, rank: int | None) -> None:
    """Compare base and rank with what the manifest offers, before anything large is fetched."""
    if base_model is not None:
        facts = base_model_facts(base_model) if isinstance(base_model, nn.Module) else base_model
        check_base_model(manifest, facts)
    if rank is not None and not 1 <= rank <= manifest.largest_rank:
        raise ConfigError(
            f"rank={rank} cannot be taken from this initialisation: ask for one from 1 to {manifest.largest_rank}."
        )


def _collect(
    source: _Source,
    manifest: Manifest,
    manifest_path: Path,
    folder: Path,
    put: _Put,
    base: nn.Module | None,
    *,
    statistics: bool = True,
) -> None:
    """Make a folder of the manifest and its files, and check all of it; if it fails, there is none."""
    left_out = () if statistics else statistics_files(manifest)
    with atomic_folder(folder) as partial:
        put(manifest_path, partial / MANIFEST_FILE)
        for name, entry in manifest.files.items():
            if name not in left_out:
                _place(source, manifest_path.parent.name, partial / name, entry, put)
        stored = load_init(partial, statistics=statistics)
        if base is not None:
            check_against_base(stored, base)


def _is_made(folder: Path, manifest: Manifest, rank: int | None, *, statistics: bool = True) -> bool:
    """Tell whether an earlier pull made the folder, and every byte that is needed of it is still the same."""
    if rank is not None:
        return is_cut(folder, manifest, rank=rank)
    try:
        return load_init(folder, statistics=statistics).manifest == manifest
    except ArtifactError:
        return False


def _holds_another(folder: Path, manifest: Manifest) -> bool:
    """Tell whether a folder holds an initialisation that is neither the one of a manifest nor a rank cut from it."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return False
    try:
        found = parse_manifest(path.read_bytes(), source=str(path))
    except ArtifactError:
        return True
    return found != manifest and not was_cut(found, manifest)


def _place(source: _Source, commit: str, target: Path, entry: FileEntry, put: _Put) -> None:
    """Put one file in its place and check it there."""

    def place(cached: Path) -> None:
        target.unlink(missing_ok=True)
        put(cached, target)
        check_file(target, entry)

    source.fetch(target.name, commit, place)


def _link(cached: Path, target: Path) -> None:
    """Link a file of the cache to a second place, or copy it where the file system cannot."""
    try:
        os.link(cached.resolve(), target)
    except OSError:
        shutil.copyfile(cached, target)
