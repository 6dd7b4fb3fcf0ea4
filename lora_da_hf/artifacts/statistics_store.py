"""The full statistics as sharded safetensors, for another rank, damping or weighting later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_da_hf.artifacts.files import put_in_place, share_as_usual, write_tensors
from lora_da_hf.artifacts.manifest import STATISTICS_PREFIX, Manifest
from lora_da_hf.artifacts.tensors import open_tensors, tensor_specs
from lora_da_hf.errors import ArtifactError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.report import LayerReport
from lora_da_hf.statistics.moments import pack_upper, unpack_upper
from lora_da_hf.statistics.taps import input_groups

_SHARD_BYTES = 2 << 30
_INPUT = "input_second_moment"
_OUTPUT = "output_grad_second_moment_diag"
_GRAD = "weight_grad"
_ROUNDING = 1e-3
_SMALLEST = 1e-30


def save_statistics(
    folder: Path, statistics: Mapping[str, LayerStatistics], shared_inputs: Mapping[str, str], *, part: int = 0
) -> None:
    """Write statistics as safetensors of at most about 2 GiB each, in an order that `adopt_statistics` reads.

    Keys are ``<layer>.weight_grad [d_out, d_in]``, ``<layer>.output_grad_second_moment_diag [d_out]`` and, once for the
    layers that share an input, ``<leader>.input_second_moment``: its upper triangle row by row. All are means, in the
    dtype that they were accumulated in.

    Args:
        folder: Where, made if need be.
        statistics: By layer. Layers that share an input come together.
        shared_inputs: The leader of each layer.
        part: Number of this part, where a folder gets them in several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, layer in statistics.items():
        tensors = {
            f"{name}.{_GRAD}": layer.weight_grad.cpu().contiguous(),
            f"{name}.{_OUTPUT}": layer.output_grad_second_moment_diag.cpu().contiguous(),
        }
        if shared_inputs[name] == name:
            tensors[f"{name}.{_INPUT}"] = pack_upper(layer.input_second_moment.cpu())
        added = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if shards[-1] and size + added > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1].update(tensors)
        size += added
    for number, shard in enumerate(shards):
        file = folder / f"{part:05d}-{number:05d}.safetensors"
        partial = folder / f".{file.name}.partial"
        write_tensors(partial, shard, {"format": "pt"})
        put_in_place(partial, file)


def adopt_statistics(folder: Path, source: Path) -> None:
    """Give a folder what `save_statistics` wrote, as ``lora_da_statistics-xxxxx-of-yyyyy.safetensors``.

    The files are linked, so they take no space twice, and stay where they were.

    Args:
        folder: Where to.
        source: Where they are, on the same file system.

    Raises:
        ArtifactError: if there are none.
    """
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ArtifactError(f"The statistics in {source} were deleted while the initialisation was made. Start again.")
    for number, shard in enumerate(shards, start=1):
        target = folder / f"{STATISTICS_PREFIX}{number:05d}-of-{len(shards):05d}.safetensors"
        share_as_usual(shard)  # `atomic_folder` leaves linked files as they are
        try:
            os.link(shard, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(shard, target)


def load_statistics(folder: Path, manifest: Manifest) -> dict[str, LayerStatistics]:
    """Read the statistics of a stored initialisation; layers that share an input share its second moment.

    Args:
        folder: The initialisation's folder, checked by `load_init`.
        manifest: Its manifest.

    Raises:
        ArtifactError: as `iterate_statistics`.
    """
    loaded = {name: layer for group in iterate_statistics(folder, manifest) for name, layer in group.items()}
    return {name: loaded[name] for name in manifest.layers}


def iterate_statistics(folder: Path, manifest: Manifest) -> Iterator[dict[str, LayerStatistics]]:
    """Read the statistics of a stored initialisation, one at a time of the groups of layers that share an input.

    Args:
        folder: The initialisation's folder, checked by `load_init`.
        manifest: Its manifest.

    Yields:
        By layer. All of them have the same tensor as the second moment of their input.

    Raises:
        ArtifactError: if they were not stored, a tensor is missing, of another size or dtype, not finite, or cannot be
            what it is called: a second moment with a negative diagonal, or off its diagonal above what that allows.
    """
    files = statistics_files(manifest)
    if not files:
        raise ArtifactError(
            f"{folder} has no statistics. Other settings need them: compute it again with save_statistics=True."
        )
    check_statistics_headers(folder, manifest)
    with open_tensors(folder / file for file in files) as read:
        for leader, names in input_groups_of(manifest).items():
            path, packed = read(f"{leader}.{_INPUT}")
            _check_moment(packed, manifest.layers[leader].in_features, f"{leader}.{_INPUT}", path)
            moment = unpack_upper(packed, manifest.layers[leader].in_features)
            yield {name: _layer(name, moment, manifest.layers[name], read) for name in names}


def _layer(
    name: str, moment: Tensor, entry: LayerReport, read: Callable[[str], tuple[Path, Tensor]]
) -> LayerStatistics:
    path, diagonal = read(f"{name}.{_OUTPUT}")
    if (diagonal < 0).any():
        raise ArtifactError(f"{path}: {name}.{_OUTPUT} is negative in places. Fetch it again.")
    return LayerStatistics(
        input_second_moment=moment,
        output_grad_second_moment_diag=diagonal,
        weight_grad=read(f"{name}.{_GRAD}")[1],
        num_input_tokens=entry.num_tokens,
        num_output_tokens=entry.num_grad_tokens,
    )


def input_groups_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the layers that share an input, by their leader."""
    return input_groups({name: layer.shares_input_with for name, layer in manifest.layers.items()})


def statistics_files(manifest: Manifest) -> list[str]:
    """Return the names of the files that hold statistics, in order; none if they were not stored."""
    return sorted(name for name in manifest.files if name.startswith(STATISTICS_PREFIX))


def check_statistics_headers(folder: Path, manifest: Manifest) -> None:
    """Verify keys, shapes and dtypes of the stored statistics, if there are any.

    Raises:
        ArtifactError: if a tensor is missing, unknown, there twice, or of another shape or dtype.
    """
    files = statistics_files(manifest)
    shapes = _shapes(manifest)
    dtypes: set[str] = set()
    for file in files:
        path = folder / file
        for name, (shape, dtype) in tensor_specs(path, max_tensors=len(shapes)).items():
            expected = shapes.pop(name, None)
            dtypes.add(dtype)
            if shape != expected or not dtypes < {"F32", "F64"}:
                raise ArtifactError(
                    f"{path}: {name} is {dtype} {list(shape)} and should be {list(expected or ())} in one precision, "
                    "F32 or F64. Compute it again."
                )
    if files and shapes:
        name, shape = next(iter(shapes.items()))
        raise ArtifactError(f"{folder}: {name} is missing and should be {list(shape)}. Compute it again.")


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in manifest.layers.items():
        shapes[f"{name}.{_GRAD}"] = (layer.out_features, layer.in_features)
        shapes[f"{name}.{_OUTPUT}"] = (layer.out_features,)
        if layer.shares_input_with == name:
            shapes[f"{name}.{_INPUT}"] = (layer.in_features * (layer.in_features + 1) // 2,)
    return shapes


def _check_moment(packed: Tensor, width: int, name: str, path: Path) -> None:
    """Verify a diagonal that is not negative, and Cauchy and Schwarz's inequality, row by row of the triangle."""
    lengths = torch.arange(width, 0, -1)
    diagonal = packed[torch.cumsum(lengths, 0) - lengths].double()
    roots = diagonal.clamp_min(0).sqrt()
    start = 0
    for row in range(width):
        entries = packed[start : start + width - row].double().abs()
        start += width - row
        if diagonal[row] < 0 or (entries > roots[row] * roots[row:] * (1 + _ROUNDING) + _SMALLEST).any():
            raise ArtifactError(f"{path}: row {row} of {name} is not that of a second moment. Fetch it again.")
