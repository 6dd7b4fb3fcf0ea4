"""Writing an initialisation to a folder in one go, and reading it back with every check."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import check_adapter_config
from lora_da_hf.artifacts.folders import adopt, atomic_folder, may_lie_beside
from lora_da_hf.artifacts.leading import check_leading
from lora_da_hf.artifacts.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASIS_FILE,
    INIT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    STATISTICS_FILE,
    BaseModelFacts,
    FileEntry,
    Manifest,
    RefittedFrom,
    parse_manifest,
)
from lora_da_hf.artifacts.tensors import basis_tensors, check_adapter, check_statistics, read_solutions, write_tensors
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LoRADAReport

logger = logging.getLogger(__name__)

_SAMPLED_ENTRIES = 1024
_PACKAGES = ("lora_da_hf", "torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True, kw_only=True)
class StoredInit:
    """An initialisation that was read from a folder and passed every check.

    Attributes:
        manifest: Everything about it that is not a tensor.
        peft_config: PEFT's configuration of the adapter.
        source: How it is cited: ``repo@commit``, or ``sha256:`` and the hash of its manifest.
        notes: What the checks could not make sure of.
    """

    folder: Path
    manifest: Manifest
    bases: dict[str, LayerSolution]
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
    bases: Mapping[str, LayerSolution],
    report: LoRADAReport,
    base_model: BaseModelFacts,
    adapter: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    statistics: Sequence[Path] = (),
    identity: Mapping[str, Any] | None = None,
    refitted_from: RefittedFrom | None = None,
) -> None:
    """Write an initialisation in place of what is in the folder: all of it, or nothing.

    ``adapter`` is PEFT's tensors and configuration; ``statistics`` are the files of what ``save_statistics`` asks for;
    ``identity`` is what a later run must have in common with this one to use it.
    """
    with atomic_folder(folder) as partial:
        tensors, config = adapter
        write_tensors(partial / ADAPTER_FILE, tensors)
        (partial / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        write_tensors(partial / BASIS_FILE, basis_tensors(bases))
        kind = "leading" if report.config["save_statistics"] == "leading" else "statistics"
        for number, path in enumerate(statistics, start=1):
            adopt(path.resolve(), partial / f"lora_da_{kind}-{number:05d}-of-{len(statistics):05d}.safetensors")
        manifest = Manifest(
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions={package: importlib.metadata.version(package) for package in _PACKAGES},
            base_model=base_model,
            identity=dict(identity or {}),
            refitted_from=refitted_from,
            files={path.name: file_entry(path) for path in sorted(partial.iterdir())},
            report=dataclasses.replace(report, artifact=None),  # no local path
        )
        (partial / MANIFEST_FILE).write_bytes(manifest.to_json().encode())


def load_init(folder: str | Path, *, statistics: bool = True, alone: bool = True) -> StoredInit:
    """Read an initialisation, checking everything before it is used.

    Size, hash, header and shapes of every file; finite values in all but stored statistics, whose numbers are looked at
    when they are used; and that the adapter is the step along the basis.

    Args:
        folder: What `write_init` wrote.
        statistics: Whether full statistics that the manifest lists must be there; False: they are not looked at.
        alone: Whether other files in the folder are refused; the Hub's cache may hold more of a repository.

    Raises:
        ArtifactError: naming the file that is missing, changed or not part of it, and the key.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    for path in sorted(folder.iterdir()):
        if alone and path.name not in (MANIFEST_FILE, *manifest.files) and not may_lie_beside(path):
            raise ArtifactError(f"{path} is not listed in the manifest. Remove it.")
    for path, entry in ((folder / name, entry) for name, entry in manifest.files.items()):
        if not statistics and STATISTICS_FILE.fullmatch(path.name):
            continue
        if not path.is_file():
            raise ArtifactError(f"{path} is listed in the manifest and missing. Get a new copy.")
        if file_entry(path) != entry:
            raise ArtifactError(f"{path} was changed: its size or SHA-256 is not the manifest's. Get a new copy.")
    config = check_adapter_config(folder / ADAPTER_CONFIG_FILE, manifest)
    bases = read_solutions(folder / BASIS_FILE, manifest)
    check_adapter(folder / ADAPTER_FILE, bases, config, manifest)
    if statistics:
        check_statistics(folder, manifest)
        check_leading(folder, manifest)
    return StoredInit(folder=folder, manifest=manifest, bases=bases, peft_config=config, source=manifest.digest)


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and look at nothing else."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist, so this is not a stored initialisation. A training leaves one in its "
            f"output_dir/{INIT_FOLDER}, and `lora-da init` makes one."
        )
    with path.open("rb") as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1), source=str(path))


def check_base_model(init: StoredInit, base_model: BaseModelFacts) -> tuple[str, ...]:
    """Compare the base that an initialisation was computed for with the one it will be used on.

    A quantised base has no fingerprint and is compared by name and revision, which is logged and returned as a note.

    Raises:
        BaseModelMismatchError: naming every difference.
    """
    stored, notes, found = init.manifest.base_model, (), list[str]()
    if stored.weights_sha256 and base_model.weights_sha256:
        if stored.weights_sha256 != base_model.weights_sha256:
            found = ["its weights have another fingerprint (a float16 copy has: load it in float32 or bfloat16)"]
    else:
        was, now = (str(facts.name_or_path or "").removeprefix("./") for facts in (stored, base_model))
        if was != now or not was:
            found.append(f"weights without a fingerprint, as quantised ones, need the name {was!r}, and it is {now!r}")
        if stored.revision and base_model.revision and stored.revision != base_model.revision:
            found.append(f"its revision is {base_model.revision!r} and was {stored.revision!r}")
        notes = (f"the base was matched by its name, {was!r}, and revision: its weights have no fingerprint",)
    if found:
        raise BaseModelMismatchError(
            f"{init.folder} was computed for {stored.name_or_path!r}, and the model differs: {'; '.join(found)}. "
            "Use that base, or compute an initialisation for this one."
        )
    for note in notes:
        logger.warning("LoRA-DA: %s", note)
    return notes


def with_base_name(stored: StoredInit, name: str | None) -> tuple[StoredInit, dict[str, bytes]]:
    """Give the base another name, such as that of a local copy on the Hub; return it with the two files that change."""
    if name in (None, stored.manifest.base_model.name_or_path):
        return stored, {}
    config = {**stored.peft_config, "base_model_name_or_path": name, "revision": None}
    data, files = json.dumps(config, indent=2, sort_keys=True).encode(), dict(stored.manifest.files)
    files[ADAPTER_CONFIG_FILE] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    base = stored.manifest.base_model.model_copy(update={"name_or_path": name, "revision": None})
    manifest = stored.manifest.model_copy(update={"base_model": base, "files": files})
    changed = {ADAPTER_CONFIG_FILE: data, MANIFEST_FILE: manifest.to_json().encode()}
    return dataclasses.replace(stored, manifest=manifest, peft_config=config, source=manifest.digest), changed


def file_entry(path: Path) -> FileEntry:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Hash 1,024 entries of each weight (or all), rounded to bfloat16, so that a bfloat16 copy has the same.

    It is None if a weight is quantised, so that its entries are not those of the original.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        data = weight.detach()
        if not data.is_floating_point() or type(weight).__name__ not in ("Parameter", "Tensor"):
            return None
        flat = data.reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_ENTRIES)
        # a copy: memory that numpy has looked into cannot be released, as FSDP2 does
        entries = flat[::step][:_SAMPLED_ENTRIES].to("cpu", torch.bfloat16, copy=True).contiguous()
        digest.update(f"{name}:{list(weight.shape)}:".encode())
        digest.update(entries.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def is_repo_id(name: str) -> bool:
    """Tell whether the Hub allows this name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
