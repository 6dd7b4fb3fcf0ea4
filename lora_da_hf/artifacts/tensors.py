"""Reading safetensors files from outside: the header first, and nothing that is not finite."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_da_hf.artifacts.strict_json import malformed
from lora_da_hf.errors import ArtifactError

TensorSpecs = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and safetensors dtype of each tensor."""

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_MAX_TENSORS = 16384
_HEADER_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 1 << 10


def read_tensors(path: Path, expected: TensorSpecs | None, *, max_tensors: int | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, header first.

    Args:
        path: The file.
        expected: Shape and dtype of each key; None: anything finite is accepted.
        max_tensors: How many tensors the header may describe; None: as many as expected, or 16384.

    Raises:
        ArtifactError: if it is no safetensors file, its keys, shapes or dtypes are others, or a value is not finite.
    """
    found = tensor_specs(path, max_tensors=max_tensors or len(expected or ()) or _MAX_TENSORS)
    if expected is not None:
        _compare(path, found, expected)
    return dict(iterate_tensors(path))


def tensor_specs(path: Path, *, max_tensors: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return what the header of a safetensors file announces, checked as far as it tells.

    Args:
        path: The file.
        max_tensors: How many tensors it may describe, for the length of the header.

    Raises:
        ArtifactError: if it is no safetensors file, a key occurs twice, or a dtype is an unusual one.
    """
    _check_header_text(path, max_tensors)
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                entry = file.get_slice(name)
                specs[name] = (tuple(entry.get_shape()), entry.get_dtype())
    except SafetensorError as error:
        raise _invalid(path, str(error)) from error
    odd = [name for name, (_, dtype) in specs.items() if dtype not in _DTYPES]
    if odd:
        raise ArtifactError(f"{path}: {odd[0]!r} is {specs[odd[0]][1]}, which no initialisation holds. Do not use it.")
    return specs


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file whose header was checked, one at a time.

    Raises:
        ArtifactError: if one holds NaN or infinity.
    """
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, _finite(path, name, file.get_tensor(name))


@contextlib.contextmanager
def open_tensors(paths: Iterable[Path]) -> Generator[Callable[[str], tuple[Path, Tensor]]]:
    """Give a function that reads one tensor of files whose headers were checked, and tells which of them has it.

    That function raises `ArtifactError` if the tensor holds NaN or infinity.
    """
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            file = stack.enter_context(safe_open(path, framework="pt"))
            places |= dict.fromkeys(file.keys(), (path, file))

        def read(name: str) -> tuple[Path, Tensor]:
            path, file = places[name]
            return path, _finite(path, name, file.get_tensor(name))

        yield read


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.numel() and not math.isfinite(tensor.abs().max().item()):
        raise ArtifactError(f"{path}: {name} holds NaN or infinity. Do not use it; compute it again.")
    return tensor


def _compare(path: Path, found: TensorSpecs, expected: TensorSpecs) -> None:
    if set(found) != set(expected):
        wrong = sorted(set(found) ^ set(expected))[:3]
        raise malformed(f"{path} and the manifest disagree on the tensors in it: {wrong} and maybe more")
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            raise ArtifactError(
                f"{path}: {name} is {found[name][1]} {list(found[name][0])}, not {dtype} {list(shape)} as the "
                "manifest says. Fetch it again."
            )


def _check_header_text(path: Path, max_tensors: int) -> None:
    """Verify what the library that reads safetensors does not: the header's length, and that no key occurs twice."""
    limit = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * max_tensors
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise _invalid(path, "its header is longer than the file")
        if length > limit:
            raise _invalid(path, f"its header has {length} bytes, and {max_tensors} tensors need {limit} at most")
        header = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ArtifactError(f"{path}: a tensor's name occurs twice in the header. Fetch it again.")
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=unique)
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise _invalid(path, "its header is no JSON") from error


def _invalid(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} is not a valid safetensors file ({reason}). Fetch it again.")
