"""Writing an initialisation to a folder in one go, and reading it back with every check."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_da_hf.artifacts.adapter_config import check_adapter_config
from lora_da_hf.artifacts.basis import StoredBasis, basis_specs, basis_tensors
from lora_da_hf.artifacts.consistency import check_adapter
from lora_da_hf.artifacts.files import write_tensors
from lora_da_hf.artifacts.fingerprint import differences
from lora_da_hf.artifacts.folders import UNLISTED_FOLDERS, atomic_folder, may_lie_beside
from lora_da_hf.artifacts.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASIS_FILE,
    INIT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    STATISTICS_PREFIX,
    BaseModelFacts,
    FileEntry,
    Manifest,
    parse_manifest,
)
from lora_da_hf.artifacts.statistics_store import check_statistics_headers
from lora_da_hf.artifacts.strict_json import malformed
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
        peft_config: PEFT's configuration of the adapter.
        source: How it is cited: ``repo@commit``, or ``sha256:`` and the hash of its manifest.
        notes: What the checks could not make sure of.
    """

    folder: Path
    manifest: Manifest
    bases: dict[str, StoredBasis]
    peft_config: dict[str, Any]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def report(self) -> LoRADAReport:
        """That of the run that made it."""
        return self.manifest.report


def write_init(
    folder: Path,
    *,
    bases: Mapping[str, StoredBasis],
    save_adapter: Callable[[Path], None],
    save_statistics: Callable[[Path], None] | None,
    make_manifest: Callable[[dict[str, FileEntry]], Manifest],
) -> None:
    """Write an initialisation: all of it, or nothing.

    Args:
        folder: Where. What is there is replaced.
        bases: By layer.
        save_adapter: Writes the PEFT adapter into the folder that it is given.
        save_statistics: Writes the full statistics there; None: they are not stored.
        make_manifest: Makes the manifest from the entries of all files.
    """
    with atomic_folder(folder) as partial:
        save_adapter(partial)
        write_tensors(partial / BASIS_FILE, basis_tensors(bases), {"format": "pt"})
        if save_statistics is not None:
            save_statistics(partial)
        entries = {path.name: file_entry(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST_FILE).write_bytes(make_manifest(entries).to_json().encode())


def file_entry(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def load_init(folder: str | Path, *, base_model: BaseModelFacts | None = None, statistics: bool = True) -> StoredInit:
    """Read an initialisation, checking everything before it is used.

    Hashes, headers, shapes and finiteness of every file, but for the numbers of stored statistics, which
    `iterate_statistics` looks at; and that the adapter is the step along the basis.

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
        name: StoredBasis(basis_A=tensors[f"{name}.basis_A"], basis_B=tensors[f"{name}.basis_B"])
        for name in manifest.layers
    }
    if statistics:
        check_statistics_headers(folder, manifest)
    config = check_adapter_config(folder / ADAPTER_CONFIG_FILE, manifest)
    adapter = read_tensors(
        folder / ADAPTER_FILE, None, max_tensors=8 * (len(manifest.layers) + len(manifest.report.kept))
    )
    check_adapter(folder / ADAPTER_FILE, adapter, bases, config, manifest)
    return StoredInit(
        folder=folder, manifest=manifest, bases=bases, peft_config=config, source=manifest.digest, notes=notes
    )


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and look at nothing else.

    Raises:
        ArtifactError: if there is none, or it is not valid.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        remedy = "Name another folder, or fetch it again."
        if (folder / INIT_FOLDER / MANIFEST_FILE).is_file():
            remedy = f"Name another folder: the initialisation of this training is {folder / INIT_FOLDER}."
        elif not folder.exists():
            remedy = "Name another folder; one on the Hub is fetched by lora_da_hf.hub.pull_init or `lora-da pull`."
        raise ArtifactError(
            f"{path} does not exist: this is not a LoRA-DA initialisation, or it is incomplete. {remedy}"
        )
    with path.open("rb") as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1), source=str(path))


def _check_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Verify that the folder holds what the manifest lists, and besides at most what is never read."""
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST_FILE, *manifest.files):
            continue
        as_known = path.is_file() if may_lie_beside(path) else path.name in UNLISTED_FOLDERS and path.is_dir()
        if not as_known:
            raise ArtifactError(f"{path} is not listed in the manifest. Remove it, or fetch the initialisation again.")


def check_base_model(manifest: Manifest, base_model: BaseModelFacts) -> tuple[str, ...]:
    """Compare the base that an initialisation was computed for with the one it will be used on.

    Bases are compared by config and by the fingerprint of their weights. A quantised base has no fingerprint: it is
    compared by name and revision instead, which is logged as a warning.

    Args:
        manifest: Of the initialisation.
        base_model: Facts of the model.

    Returns:
        What could not be made sure of.

    Raises:
        BaseModelMismatchError: naming every difference.
    """
    stored = manifest.base_model
    found = differences(stored.config, base_model.config)
    notes: tuple[str, ...] = ()
    if stored.weights_sha256 and base_model.weights_sha256:
        if not found and stored.weights_sha256 != base_model.weights_sha256:
            found = ["its weights have another fingerprint (a float16 copy has: load it in float32 or bfloat16)"]
    else:
        found += _differences_of_names(stored, base_model)
        notes = (
            "the base's weights were not compared, since quantised or sharded ones have no fingerprint: that it is "
            f"{stored.name_or_path!r} is taken from its name and revision",
        )
    if found:
        raise BaseModelMismatchError(
            f"This initialisation was computed for {_name_of(stored)}, and the model differs: "
            f"{'; '.join(found)}. Use that base, or compute an initialisation for this one."
        )
    for note in notes:
        logger.warning("LoRA-DA: %s", note)
    return notes


def _name_of(base_model: BaseModelFacts) -> str:
    return repr(base_model.name_or_path) if base_model.name_or_path else "a base without a name"


def _differences_of_names(expected: BaseModelFacts, found: BaseModelFacts) -> list[str]:
    if not expected.name_or_path or not found.name_or_path:
        which = "the model" if expected.name_or_path else "the base that it was computed for"
        return [f"weights without a fingerprint, as quantised ones, are matched by name, and {which} has none"]
    by_name, of_model = (
        {"name_or_path": str(facts.name_or_path).removeprefix("./"), "revision": facts.revision}
        for facts in (expected, found)
    )
    return differences(by_name, of_model)


def check_file(path: Path, entry: FileEntry) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        ArtifactError: if it is missing, or of another size or hash.
    """
    if not path.is_file():
        again = "Fetch it again."
        if path.name.startswith(STATISTICS_PREFIX):
            again = "Fetch all of it with `lora-da pull`: `init_from` leaves the statistics out."
        raise ArtifactError(f"{path} is listed in the manifest and is not there as a file. {again}")
    size = path.stat().st_size
    if size != entry.size:
        raise malformed(f"{path} has {size} bytes and the manifest says {entry.size}: truncated or changed")
    if file_entry(path).sha256 != entry.sha256:
        raise ArtifactError(f"{path} has another SHA-256 than the manifest says: it was changed. Fetch it again.")
