"""The full statistics as sharded safetensors, for another rank, damping or weighting later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.tensors import check_specs, finite, tensor_specs, write_tensors
from lora_da_hf.errors import ArtifactError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.statistics.moments import pack_upper, unpack_upper
from lora_da_hf.statistics.taps import input_groups

_SHARD_BYTES = 2 << 30
_INPUT = "input_second_moment"
_OUTPUT = "output_grad_second_moment_diag"
_GRAD = "weight_grad"


def save_statistics(
    folder: Path, statistics: Mapping[str, LayerStatistics], shared_inputs: Mapping[str, str], *, part: int = 0
) -> None:
    """Write statistics as safetensors of at most about 2 GiB each, whose names sort in their order.

    Keys are ``<layer>.weight_grad [d_out, d_in]``, ``<layer>.output_grad_second_moment_diag [d_out]`` and, once for the
    layers that share an input, ``<leader>.input_second_moment``: its upper triangle row by row. All are means, in the
    dtype that they were accumulated in.

    Args:
        folder: Where, made if need be.
        statistics: By layer. Layers that share an input come together.
        shared_inputs: The leader of each layer.
        part: Number of this call, where a folder gets them in several.
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
        write_tensors(folder / f"{part:05d}-{number:05d}.safetensors", shard)


def iterate_statistics(folder: Path, manifest: Manifest) -> Iterator[dict[str, LayerStatistics]]:
    """Yield the statistics of a folder that `load_init` checked, by groups of layers that share an input's moment.

    Raises:
        ArtifactError: if they were not stored, or are not finite.
    """
    files = manifest.statistics_files
    if not files:
        raise ArtifactError(
            f"{folder} has no statistics. Other settings need them: compute it again with save_statistics=True."
        )
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Path, Any]] = {}
        for path in (folder / file for file in files):
            opened = stack.enter_context(safe_open(path, framework="pt"))
            places |= dict.fromkeys(opened.keys(), (path, opened))

        def read(name: str) -> Tensor:
            path, opened = places[name]
            return finite(path, name, opened.get_tensor(name))

        for leader, names in input_groups_of(manifest).items():
            moment = unpack_upper(read(f"{leader}.{_INPUT}"), manifest.layers[leader].in_features)
            yield {
                name: LayerStatistics(
                    input_second_moment=moment,
                    output_grad_second_moment_diag=read(f"{name}.{_OUTPUT}"),
                    weight_grad=read(f"{name}.{_GRAD}"),
                    num_input_tokens=manifest.layers[name].num_tokens,
                    num_output_tokens=manifest.layers[name].num_grad_tokens,
                )
                for name in names
            }


def input_groups_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the layers that share an input, by their leader."""
    return input_groups({name: layer.shares_input_with for name, layer in manifest.layers.items()})


def check_statistics(folder: Path, manifest: Manifest) -> None:
    """Verify keys, shapes and dtypes of the stored statistics, if there are any."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in manifest.layers.items():
        shapes[f"{name}.{_GRAD}"] = (layer.out_features, layer.in_features)
        shapes[f"{name}.{_OUTPUT}"] = (layer.out_features,)
        if layer.shares_input_with == name:
            shapes[f"{name}.{_INPUT}"] = (layer.in_features * (layer.in_features + 1) // 2,)
    for path in (folder / file for file in manifest.statistics_files):
        found = tensor_specs(path, max_tensors=len(shapes))
        dtype = "F64" if any(dtype == "F64" for _, dtype in found.values()) else "F32"
        check_specs(path, found, {name: (shapes.pop(name, ()), dtype) for name in found})
    if shapes and manifest.statistics_files:
        raise ArtifactError(f"{folder}: the statistics lack {min(shapes)!r}. Do not use it.")
