"""Writing an initialisation to a folder in one go, and reading it back with every check."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_da_hf.artifacts.adapter_config import check_adapter_config
from lora_da_hf.artifacts.basis import StoredBasis, basis_specs, basis_tensors
from lora_da_hf.artifacts.consistency import basis_sums, check_adapter, check_bases, check_report
from lora_da_hf.artifacts.files import write_tensors
from lora_da_hf.artifacts.fingerprint import differences
from lora_da_hf.artifacts.folders import UNLISTED_FOLDERS, atomic_folder, may_lie_beside
from lora_da_hf.artifacts.schema import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASIS_FILE,
    INIT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    REPORT_FILE,
    STATISTICS_PREFIX,
    FileEntry,
    Manifest,
    parse_manifest,
)
from lora_da_hf.artifacts.statistics_store import check_statistics_headers
from lora_da_hf.artifacts.strict_json import malformed, too_large
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError
from lora_da_hf.report import LoRADAReport

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StoredInit:
    """An initialisation that was read from a folder and passed every check.

    Attributes:
        folder: Where it is.
        manifest: Everything about it that is not a tensor.
        bases: By layer.
        report: That of the run that made it.
        peft_config: PEFT's configuration of the adapter.
        notes: What the checks could not make sure of.
    """

    folder: Path
    manifest: Manifest
    bases: dict[str, StoredBasis]
    report: LoRADAReport
    peft_config: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PulledInit:
    """An initialisation that was fetched from the Hub, on disk and checked.

    Attributes:
        folder: For `load_init` (with ``statistics=False`` if it was pulled so), and for ``PeftModel.from_pretrained``.
        repo_id: Owner and name.
        revision: What was asked for.
        commit: What that was resolved to: the one to cite.
    """

    folder: Path
    repo_id: str
    revision: str | None
    commit: str


def write_init(
    folder: Path,
    *,
    bases: Mapping[str, StoredBasis],
    save_adapter: Callable[[Path], None],
    report: LoRADAReport,
    save_statistics: Callable[[Path], None] | None,
    make_manifest: Callable[[dict[str, FileEntry]], Manifest],
) -> None:
    """Write an initialisation: all of it, or nothing.

    Args:
        folder: Where. What is there is replaced.
        bases: By layer.
        save_adapter: Writes the PEFT adapter into the folder that it is given.
        report: Gets the sums that tie it to the bases, and is written there without local paths.
        save_statistics: Writes the full statistics there; None: they are not stored.
        make_manifest: Makes the manifest from the entries of all files.
    """
    with atomic_folder(folder) as partial:
        save_adapter(partial)
        _note_sums(report, bases)
        dataclasses.replace(report, artifact=None).save(partial / REPORT_FILE)  # no local path
        write_tensors(partial / BASIS_FILE, basis_tensors(bases), {"format": "pt"})
        if save_statistics is not None:
            save_statistics(partial)
        entries = {path.name: file_entry(path) for path in sorted(partial.iterdir())}
        manifest = make_manifest(entries)
        (partial / MANIFEST_FILE).write_bytes(manifest.to_json().encode("utf-8"))


def _note_sums(report: LoRADAReport, bases: Mapping[str, StoredBasis]) -> None:
    for layer in report.layers:
        rows, columns = basis_sums(layer.name, bases[layer.name])
        layer.basis_A_sums, layer.basis_B_sums = rows.tolist(), columns.tolist()


def file_entry(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def load_init(
    folder: str | Path, *, base_model: Mapping[str, Any] | None = None, statistics: bool = True
) -> StoredInit:
    """Read an initialisation, checking everything before it is used.

    Hashes, headers, shapes and finiteness of every file but the numbers of stored statistics, which
    `iterate_statistics` and `check_statistics` look at; and that basis, adapter, its config and the report tell one
    story.

    Args:
        folder: What `write_init` wrote.
        base_model: Facts of the model it will be used on, as `check_base_model` takes them; None: not compared.
        statistics: Whether full statistics that the manifest lists must be there; False: they may be missing, and are
            not looked at, as for `apply_init`, which uses none.

    Raises:
        ArtifactError: if a file is missing, truncated, changed, of another schema, not listed, holds anything but the
            tensors that the manifest announces, or contradicts another one.
        BaseModelMismatchError: if it was computed for another base model.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    notes = () if base_model is None else check_base_model(manifest, base_model)
    _check_nothing_else(folder, manifest)
    for name, entry in manifest.files.items():
        if statistics or not name.startswith(STATISTICS_PREFIX):
            check_file(folder / name, entry)
    tensors = read_tensors(folder / BASIS_FILE, basis_specs(manifest))
    bases = {
        name: StoredBasis(
            basis_A=tensors[f"{name}.basis_A"],
            basis_B=tensors[f"{name}.basis_B"],
            eigenvalues=tensors[f"{name}.eigenvalues"],
        )
        for name in manifest.layers
    }
    if statistics:
        check_statistics_headers(folder, manifest)
    check_bases(folder / BASIS_FILE, bases, manifest)
    report = check_report(folder / REPORT_FILE, bases, manifest)
    config = check_adapter_config(folder / ADAPTER_CONFIG_FILE, manifest)
    adapter = read_tensors(folder / ADAPTER_FILE, None, max_tensors=8 * (len(manifest.layers) + len(manifest.kept)))
    check_adapter(folder / ADAPTER_FILE, adapter, bases, config, manifest)
    return StoredInit(folder=folder, manifest=manifest, bases=bases, report=report, peft_config=config, notes=notes)


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and look at nothing else.

    Raises:
        ArtifactError: if there is none, or it is not valid.
    """
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        remedy = "Name another folder, or fetch it again."
        if (folder / INIT_FOLDER / MANIFEST_FILE).is_file():
            remedy = f"Name another folder: the initialisation of this training is {folder / INIT_FOLDER}."
        elif not folder.exists():
            remedy = "Name another folder; one on the Hub is fetched by lora_da_hf.hub.pull_init or `lora-da pull`."
        raise ArtifactError(
            f"{path} does not exist: this is not a LoRA-DA initialisation, or it is incomplete. {remedy}"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise too_large(str(path), path.stat().st_size, MAX_MANIFEST_BYTES)
    return parse_manifest(path.read_bytes(), source=str(path))


def _check_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Verify that the folder holds what the manifest lists, and besides at most what is never read."""
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST_FILE, *manifest.files):
            continue
        as_known = path.is_file() if may_lie_beside(path) else path.name in UNLISTED_FOLDERS and path.is_dir()
        if not as_known or path.is_symlink():
            raise ArtifactError(f"{path} is not listed in the manifest. Remove it, or fetch the initialisation again.")


def check_base_model(manifest: Manifest, base_model: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare the base that an initialisation was computed for with the one it will be used on.

    Bases are compared by config and by the fingerprint of their weights. A quantised base has no fingerprint: it is
    compared by name and revision instead, which is logged as a warning.

    Args:
        manifest: Of the initialisation.
        base_model: ``config``, ``weights_sha256``, ``name_or_path`` and ``revision`` of the model.

    Returns:
        What could not be made sure of.

    Raises:
        BaseModelMismatchError: naming every difference.
    """
    stored = manifest.base_model
    found = differences(stored.get("config") or {}, base_model.get("config") or {})
    notes: tuple[str, ...] = ()
    if stored.get("weights_sha256") and base_model.get("weights_sha256"):
        if not found and stored["weights_sha256"] != base_model["weights_sha256"]:
            found = ["its weights have another fingerprint (a float16 copy has: load it in float32 or bfloat16)"]
    else:
        found += _differences_of_names(stored, base_model)
        notes = (
            "the base's weights were not compared, since quantised or sharded ones have no fingerprint: that it is "
            f"{stored.get('name_or_path')!r} is taken from its name and revision",
        )
    if found:
        raise BaseModelMismatchError(
            f"This initialisation was computed for {_name_of(stored)}, and the model differs: "
            f"{'; '.join(found)}. Use that base, or compute an initialisation for this one."
        )
    for note in notes:
        logger.warning("LoRA-DA: %s", note)
    return notes


def _name_of(base_model: Mapping[str, Any]) -> str:
    name = base_model.get("name_or_path")
    return repr(name) if name else "a base without a name"


def _differences_of_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    if not expected.get("name_or_path") or not found.get("name_or_path"):
        which = "the model" if expected.get("name_or_path") else "the base that it was computed for"
        return [f"weights without a fingerprint, as quantised ones, are matched by name, and {which} has none"]
    by_name, of_model = (
        {"name_or_path": facts["name_or_path"].removeprefix("./"), "revision": facts.get("revision")}
        for facts in (expected, found)
    )
    return differences(by_name, of_model)


def check_file(path: Path, entry: FileEntry) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        ArtifactError: if it is missing, a link, or of another size or hash.
    """
    if path.is_symlink() or not path.is_file():
        again = "Fetch it again."
        if path.name.startswith(STATISTICS_PREFIX):
            again = "Fetch all of it with `lora-da pull`: `init_from` leaves the statistics out."
        raise ArtifactError(f"{path} is listed in the manifest and is not there as a file. {again}")
    size = path.stat().st_size
    if size != entry.size:
        raise malformed(f"{path} has {size} bytes and the manifest says {entry.size}: truncated or changed")
    if file_entry(path).sha256 != entry.sha256:
        raise ArtifactError(f"{path} has another SHA-256 than the manifest says: it was changed. Fetch it again.")
