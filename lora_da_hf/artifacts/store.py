"""Writing an initialisation to a folder in one go, and reading it back with every check."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.artifacts.fingerprint import differences
from lora_da_hf.artifacts.schema import (
    ADAPTER_FILE,
    BASIS_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError

_CHUNK = 1 << 20
_PARTIAL = ".{}.partial-"
_OLD = ".{}.old-"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class StoredBasis:
    """The stored subspace of one layer.

    Attributes:
        basis_A: ``[max_rank, d_in]``, the transposed input basis.
        basis_B: ``[d_out, max_rank]``, the displacement times the input basis.
        eigenvalues: ``[max_rank]``, of the guidance matrix, ascending.
    """

    basis_A: Tensor
    basis_B: Tensor
    eigenvalues: Tensor


@dataclass(frozen=True, kw_only=True)
class StoredInit:
    """An initialisation that was read from a folder and passed every check."""

    folder: Path
    manifest: Manifest
    bases: dict[str, StoredBasis]


@contextlib.contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """Give a temporary folder beside ``target`` that takes its place if the block ends well.

    What was at ``target`` before is replaced. If the block fails, it is as it was and nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL.format(target.name), dir=target.parent))
    try:
        yield partial
        for path in partial.iterdir():
            path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            _sync(path)
        partial.chmod(0o777 & ~_umask())
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=_OLD.format(target.name), dir=target.parent))
            target.rename(aside / target.name)
            try:
                partial.rename(target)
            except BaseException:
                (aside / target.name).rename(target)
                aside.rmdir()
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what `atomic_folder` could not, because its process was killed; a replaced folder is put back.

    No other process may be writing to ``target``.
    """
    name = glob.escape(target.name)
    for partial in target.parent.glob(_PARTIAL.format(name) + "*"):
        shutil.rmtree(partial)
    for aside in target.parent.glob(_OLD.format(name) + "*"):
        if (aside / target.name).exists() and not target.exists():
            (aside / target.name).rename(target)
        shutil.rmtree(aside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_init(
    folder: Path,
    *,
    bases: Mapping[str, StoredBasis],
    save_adapter: Callable[[Path], None],
    save_report: Callable[[Path], None],
    save_statistics: Callable[[Path], None] | None,
    make_manifest: Callable[[dict[str, FileEntry]], Manifest],
) -> Manifest:
    """Write an initialisation: all of it, or nothing.

    Args:
        folder: Where. What is there is replaced.
        bases: By layer.
        save_adapter: Writes the PEFT adapter into the folder that it is given.
        save_report: Writes the report there.
        save_statistics: Writes the full statistics there; None: they are not stored.
        make_manifest: Makes the manifest from the entries of all files.
    """
    with atomic_folder(folder) as partial:
        save_adapter(partial)
        save_report(partial)
        save_file(basis_tensors(bases), partial / BASIS_FILE, metadata={"format": "pt"})
        if save_statistics is not None:
            save_statistics(partial)
        entries = {path.name: file_entry(path) for path in sorted(partial.iterdir())}
        manifest = make_manifest(entries)
        (partial / MANIFEST_FILE).write_bytes(manifest.to_json().encode("utf-8"))
    return manifest


def basis_tensors(bases: Mapping[str, StoredBasis]) -> dict[str, Tensor]:
    """Return the tensors of the basis file: ``<layer>.basis_A`` and ``.basis_B`` in float32, ``.eigenvalues`` in 64."""
    tensors: dict[str, Tensor] = {}
    for name, basis in bases.items():
        tensors[f"{name}.basis_A"] = basis.basis_A.to("cpu", torch.float32).contiguous()
        tensors[f"{name}.basis_B"] = basis.basis_B.to("cpu", torch.float32).contiguous()
        tensors[f"{name}.eigenvalues"] = basis.eigenvalues.to("cpu", torch.float64).contiguous()
    return tensors


def file_entry(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def load_init(folder: str | Path, *, base_model: Mapping[str, Any] | None = None) -> StoredInit:
    """Read an initialisation, checking everything before it is used.

    Args:
        folder: What `write_init` wrote.
        base_model: Facts of the model it will be used on (``config`` and ``weights_sha256``); None: not compared.

    Raises:
        ArtifactError: if a file is missing, truncated, changed, of another schema, or holds anything but the
            tensors that the manifest announces.
        BaseModelMismatchError: if it was computed for another base model.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} does not exist: this is not a LoRA-DA initialisation, or it is incomplete.")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not text: it was changed. Fetch it again.") from error
    manifest = parse_manifest(text, source=str(path))
    if base_model is not None:
        check_base_model(manifest, base_model)
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry)
    expected = {
        key: (shape, dtype)
        for name, layer in manifest.layers.items()
        for key, shape, dtype in (
            (f"{name}.basis_A", (layer.max_rank, layer.in_features), "F32"),
            (f"{name}.basis_B", (layer.out_features, layer.max_rank), "F32"),
            (f"{name}.eigenvalues", (layer.max_rank,), "F64"),
        )
    }
    tensors = read_tensors(folder / BASIS_FILE, expected)
    _check_adapter(folder / ADAPTER_FILE, manifest)
    bases = {
        name: StoredBasis(
            basis_A=tensors[f"{name}.basis_A"],
            basis_B=tensors[f"{name}.basis_B"],
            eigenvalues=tensors[f"{name}.eigenvalues"],
        )
        for name in manifest.layers
    }
    return StoredInit(folder=folder, manifest=manifest, bases=bases)


def _check_adapter(path: Path, manifest: Manifest) -> None:
    """Verify that the adapter holds finite factors of the announced shapes; it may hold those of kept layers too."""
    tensors = read_tensors(path, None)
    for name, layer in manifest.layers.items():
        shapes = {"lora_A": (layer.rank, layer.in_features), "lora_B": (layer.out_features, layer.rank)}
        for factor, shape in shapes.items():
            tensor = tensors.get(f"{_PEFT_PREFIX}{name}.{factor}.weight")
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"{list(tensor.shape)}"
                raise ArtifactError(
                    f"{path}: {factor} of {name} is {found}, not {list(shape)} as the manifest says. Fetch it again."
                )


def check_base_model(manifest: Manifest, base_model: Mapping[str, Any]) -> None:
    """Compare the base that an initialisation was computed for with the one it will be used on.

    Raises:
        BaseModelMismatchError: naming every difference.
    """
    found = differences(manifest.base_model.get("config") or {}, base_model.get("config") or {})
    expected_hash, found_hash = manifest.base_model.get("weights_sha256"), base_model.get("weights_sha256")
    if not found and expected_hash and found_hash and expected_hash != found_hash:
        found = ["its weights have another fingerprint"]
    if found:
        raise BaseModelMismatchError(
            f"This initialisation was computed for {manifest.base_model.get('name_or_path')!r}, and the model differs: "
            f"{'; '.join(found)}. Use that base, or compute an initialisation for this one."
        )


def _check_file(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} is listed in the manifest and is not there as a file. Fetch it again.")
    size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(f"{path} has {size} bytes and the manifest says {entry.size}: truncated or changed.")
    if file_entry(path).sha256 != entry.sha256:
        raise ArtifactError(f"{path} has another SHA-256 than the manifest says: it was changed. Fetch it again.")


def read_tensors(path: Path, expected: Mapping[str, tuple[tuple[int, ...], str]] | None) -> dict[str, Tensor]:
    """Read a safetensors file, header first.

    Args:
        path: The file.
        expected: Shape and dtype of each key; None: anything finite is accepted.

    Raises:
        ArtifactError: if it is no safetensors file, its keys, shapes or dtypes are others, or a value is not finite.
    """
    try:
        _check_no_duplicate_keys(path)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if expected is not None:
                _check_header(path, file, set(names), expected)
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a valid safetensors file ({error}). Fetch it again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(tensor.double().sum().item()):
            raise ArtifactError(f"{path}: {name} holds NaN or infinity. Do not use it; compute it again.")
    return tensors


def _check_header(path: Path, file: Any, names: set[str], expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    if names != set(expected):
        wrong = sorted(names ^ set(expected))[:3]
        raise ArtifactError(f"{path} and the manifest disagree on the tensors in it: {wrong} and maybe more.")
    for name, (shape, dtype) in expected.items():
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() != dtype:
            raise ArtifactError(
                f"{path}: {name} is {found.get_dtype()} {found.get_shape()}, not {dtype} {list(shape)} as the manifest "
                "says. Fetch it again."
            )


def _check_no_duplicate_keys(path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size, 100 * _CHUNK):
            raise ArtifactError(f"{path} is not a valid safetensors file: its header is longer than the file.")
        header = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ArtifactError(f"{path}: a tensor's name occurs twice in the header. Fetch it again.")
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=unique)
    except ValueError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is not a valid safetensors file: its header is no JSON.") from error
