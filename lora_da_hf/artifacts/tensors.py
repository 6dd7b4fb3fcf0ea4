"""Safetensors files, read header first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.errors import ArtifactError

TensorSpecs = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and safetensors dtype of each tensor."""

_HEADER_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 1 << 10


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, and say how much room they take if the disk has none."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise ArtifactError(
            f"{path} could not be written ({error}). Make room for {size / 2**20:,.0f} MiB, or name another folder."
        ) from error


def tensor_specs(path: Path, *, max_tensors: int) -> TensorSpecs:
    """Return what the header of a safetensors file announces, of at most ``max_tensors``."""
    limit = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * max_tensors
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > limit:
            raise ArtifactError(f"{path} is not a safetensors file, or its header is too long. Do not use it.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            specs = {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a valid safetensors file ({error}). Do not use it.") from error
    if len(specs) > max_tensors:
        raise ArtifactError(f"{path} holds {len(specs)} tensors, and at most {max_tensors} can be. Do not use it.")
    return specs


def read_tensors(path: Path, expected: TensorSpecs | None) -> dict[str, Tensor]:
    """Read a safetensors file, whose header was checked if nothing is ``expected``.

    Raises:
        ArtifactError: if its keys, shapes or dtypes are others, or a value is not finite.
    """
    if expected is not None:
        check_specs(path, tensor_specs(path, max_tensors=len(expected)), expected)
    with safe_open(path, framework="pt") as file:
        return {name: finite(path, name, file.get_tensor(name)) for name in file.keys()}


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file, unless it holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel() and not math.isfinite(tensor.abs().max().item()):
        raise ArtifactError(f"{path}: {name} holds NaN or infinity. Do not use it.")
    return tensor


def check_specs(path: Path, found: TensorSpecs, expected: TensorSpecs) -> None:
    """Refuse a file whose tensors are not exactly those of the manifest, naming the first that differs."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            says, holds = expected.get(name, "not there"), found.get(name, "not there")
            raise ArtifactError(f"{path}: {name[:160]!r} is {holds}, and by the manifest {says}. Do not use it.")
