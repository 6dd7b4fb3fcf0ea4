"""`export_init`: stored statistics in the formats that PEFT's own starts and llama.cpp read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX, expert_of
from lora_da_hf.artifacts.store import StoredInit, load_init
from lora_da_hf.artifacts.tensors import iterate_statistics, write_tensors
from lora_da_hf.errors import ConfigError
from lora_da_hf.records import LayerStatistics
from lora_da_hf.statistics.moments import full_precision
from lora_da_hf.theory.kronecker import in_float64
from lora_da_hf.theory.solve import solve_layer

Format = Literal["eva", "corda", "lora_ga", "imatrix"]


def export_init(folder: str | Path, output: str | Path, *, to: Format) -> list[str]:
    """Write the statistics in another program's format, so that it needs no pass of its own.

    ======== ==================================================== ===========================================
    to       for                                                  holds
    ======== ==================================================== ===========================================
    eva      ``initialize_lora_eva_weights(eva_state_dict=...)``  principal components, ``[r, d_in]``
    corda    ``CordaConfig(covariance_file=...)``                 ``E[x x^T]``, ``[d_in, d_in]``
    lora_ga  ``preprocess_loraga(cache_file=...)``                the gradient, ``[d_out, d_in]``
    imatrix  ``llama-quantize --imatrix``                         sums of ``x**2``, ``[d_in]``, and their counts
    ======== ==================================================== ===========================================

    The file of EVA is safetensors, to be read with ``safetensors.torch.load_file``. PEFT reads those of CorDA and
    LoRA-GA with ``torch.load``: make them where you use them, and publish none.

    Args:
        folder: A stored initialisation with its full statistics.
        output: The file, which must not be there yet.
        to: The format.

    Returns:
        The layers that the format has no place for, such as single experts.

    Raises:
        ArtifactError: if the folder is damaged, or has no statistics.
        ConfigError: if ``output`` exists, the format is not known, or it has a place for no layer.
        ImportError: if ``to="imatrix"`` and gguf is not installed.
    """
    folder, output = Path(folder), Path(output)
    if to not in get_args(Format):
        raise ConfigError(f"to={to!r} must be one of {', '.join(get_args(Format))}.")
    if output.exists():
        raise ConfigError(f"{output} is there already. Give the name of a new file.")
    stored = load_init(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    groups = iterate_statistics(folder, stored.manifest)
    layers = {name: layer for group in groups for name, layer in group.items() if expert_of(name) is None}
    partial = output.with_name(f".{output.name}.partial")
    try:
        written = list(layers)
        if to == "imatrix":
            written = _write_imatrix(stored, layers, partial)
        elif to == "eva":
            write_tensors(partial, _principal_components(stored, layers))
        elif to == "corda":
            torch.save({name: in_float64(layer.input_second_moment).float() for name, layer in layers.items()}, partial)
        else:
            turned = stored.peft_config["fan_in_fan_out"]  # as the layer has its weight
            grads = {f"{name}._peft_loraga_grad": layer.weight_grad for name, layer in layers.items()}
            torch.save({key: g.mT.contiguous() if turned else g for key, g in grads.items()}, partial)
        if not written:
            raise ConfigError(f"The format {to} has a place for none of the layers of {folder}.")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return [name for name in stored.manifest.layers if name not in written]


def _principal_components(stored: StoredInit, layers: Mapping[str, LayerStatistics]) -> dict[str, torch.Tensor]:
    """Return those of the inputs of each layer, ``[r, d_in]``, which are found once for all that share an input."""
    config, abouts = dataclasses.replace(stored.manifest.config, start="inputs"), stored.manifest.layers
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        leader = abouts[name].shares_input_with
        if leader not in found:
            rank = max(about.rank for about in abouts.values() if about.shares_input_with == leader)
            with full_precision("cpu"):
                solution = solve_layer(layer, None, config, layer=name, rank=rank, population_size=1)
            found[leader] = solution.basis_A.float()
    return {PEFT_PREFIX + name: found[abouts[name].shares_input_with][: abouts[name].rank].clone() for name in layers}


def _write_imatrix(stored: StoredInit, layers: Mapping[str, LayerStatistics], path: Path) -> list[str]:
    import gguf  # an extra

    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1024)  # decoders of other families share its names
    found = {name: names.get_name(name) for name in layers}
    written = [name for name in layers if found[name] is not None]
    report = stored.report
    writer: Any = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [stored.source])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, report.num_samples)
    longest = max(layer.num_input_tokens for layer in layers.values())
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, max(1, longest // max(report.num_samples, 1)))
    for name in written:
        count = layers[name].num_input_tokens
        sums = in_float64(layers[name].input_second_moment).diagonal() * count
        writer.add_tensor(f"{found[name]}.weight.in_sum2", sums.float().numpy())
        writer.add_tensor(f"{found[name]}.weight.counts", torch.tensor([float(count)]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
