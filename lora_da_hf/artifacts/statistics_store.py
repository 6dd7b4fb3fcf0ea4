"""The full statistics as sharded safetensors, for another rank, damping or weighting later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.artifacts.schema import Manifest
from lora_da_hf.artifacts.store import read_tensors
from lora_da_hf.errors import ArtifactError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.statistics.moments import pack_upper, unpack_upper

STATISTICS_PREFIX = "lora_da_statistics-"
_SHARD_BYTES = 2 << 30


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
            f"{name}.weight_grad": layer.weight_grad.cpu().contiguous(),
            f"{name}.output_grad_second_moment_diag": layer.output_grad_second_moment_diag.cpu().contiguous(),
        }
        if shared_inputs[name] == name:
            tensors[f"{name}.input_second_moment"] = pack_upper(layer.input_second_moment.cpu())
        added = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if shards[-1] and size + added > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1].update(tensors)
        size += added
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{part:05d}-{number:05d}.safetensors", metadata={"format": "pt"})


def adopt_statistics(folder: Path, source: Path) -> None:
    """Give a folder what `save_statistics` wrote, as ``lora_da_statistics-xxxxx-of-yyyyy.safetensors``.

    The files are linked, so they take no space twice, and stay where they were.

    Args:
        folder: Where to.
        source: Where they are, on the same file system.
    """
    shards = sorted(source.iterdir())
    for number, shard in enumerate(shards, start=1):
        target = folder / f"{STATISTICS_PREFIX}{number:05d}-of-{len(shards):05d}.safetensors"
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
        ArtifactError: if they were not stored, or a tensor is missing or of another size.
    """
    files = sorted(name for name in manifest.files if name.startswith(STATISTICS_PREFIX))
    if not files:
        raise ArtifactError(
            f"{folder} has no statistics. Other settings need them: compute it again with save_statistics=True."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(folder / file, None))
    loaded: dict[str, LayerStatistics] = {}
    moments: dict[str, Tensor] = {}
    for name, layer in manifest.layers.items():
        leader = layer.shares_input_with
        d_in, d_out = layer.in_features, layer.out_features
        weight_grad = _take(tensors, f"{name}.weight_grad", (d_out, d_in), folder)
        diagonal = _take(tensors, f"{name}.output_grad_second_moment_diag", (d_out,), folder)
        packed = _take(tensors, f"{leader}.input_second_moment", (d_in * (d_in + 1) // 2,), folder)
        if leader not in moments:
            moments[leader] = unpack_upper(packed, d_in)
        loaded[name] = LayerStatistics(
            input_second_moment=moments[leader],
            output_grad_second_moment_diag=diagonal,
            weight_grad=weight_grad,
            num_input_tokens=layer.num_tokens,
            num_output_tokens=layer.num_grad_tokens,
        )
    return loaded


def _take(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float64):
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ArtifactError(f"{folder}: {key} is {found} and should be {list(shape)}. Compute it again.")
    return tensor
