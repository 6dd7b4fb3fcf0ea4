"""The tensors of a stored adapter: the step along the basis, and besides only what this adapter has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX, expert_of, holder_of, is_saved
from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.tensors import read_tensors, tensor_specs
from lora_da_hf.errors import ArtifactError
from lora_da_hf.records import LayerSolution
from lora_da_hf.theory.steps import paper_step_size

MAGNITUDE = ".lora_magnitude_vector"
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_embedding_A", ".lora_embedding_B", MAGNITUDE)
"""What PEFT may store of a layer."""
_TOLERANCE = 1e-4
"""Relative; and four roundings of the adapter's dtype."""


def factor_key(name: str, factor: str) -> str:
    """Return the key under which PEFT stores a layer's ``"A"`` or ``"B"``; all experts of a parameter have one."""
    return f"{PEFT_PREFIX}{holder_of(name)}.lora_{factor}.weight"


def stored_factor(tensors: Mapping[str, Tensor], name: str, factor: str, rank: int) -> Tensor | None:
    """Return a layer's ``"A"`` or ``"B"`` out of the tensors of an adapter's file; None if it is not there.

    Of experts, PEFT stores all rows of one A together, and the columns of one B apart.
    """
    tensor, index = tensors.get(factor_key(name, factor)), expert_of(name)
    if tensor is None or index is None:
        return tensor
    if factor == "A":
        return tensor[index * rank : (index + 1) * rank]
    return tensor[:, index :: max(tensor.shape[-1] // rank, 1)]


def check_adapter(path: Path, bases: Mapping[str, LayerSolution], config: dict[str, Any], manifest: Manifest) -> None:
    """Verify that ``s B A`` of each layer is the step times the basis at its rank, and that nothing else is there.

    PEFT loads by name whatever it finds: a tensor with the name of a base weight would replace that weight.
    """
    layers, kept = manifest.layers, manifest.report.kept
    keys = set(tensor_specs(path, max_tensors=4 * (len(layers) + len(kept)) + 4096))
    missing = {f"{PEFT_PREFIX}{name}{MAGNITUDE}" for name in layers if config["use_dora"]} - keys
    if missing:
        raise ArtifactError(f"{path}: {min(missing)!r} is missing. Do not use it.")
    of_adapter = {f"{PEFT_PREFIX}{holder_of(name)}{end}" for name in (*layers, *kept) for end in _ENDS}
    others = {key for key in keys - of_adapter if not _is_trained(key, config)}
    if others and not config["ensure_weight_tying"]:
        raise _foreign(path, others)
    tensors = read_tensors(path, None)
    if others:  # of tied weights PEFT names one and stores both
        trained = {_digest(tensors[key]) for key in keys - of_adapter - others}
        others = {key for key in others if ".lora_" in key or _digest(tensors[key]) not in trained}
        if others:
            raise _foreign(path, others)
    moved = [key for key in keys if key.endswith(".lora_B.bias") and tensors[key].any()]
    if moved:
        raise ArtifactError(f"{path}: {min(moved)!r} is not zero, as an untrained adapter's is. Do not use it.")
    for name, layer in layers.items():
        factors: list[Tensor] = []
        for factor, shape in (("A", (layer.rank, layer.in_features)), ("B", (layer.out_features, layer.rank))):
            tensor = stored_factor(tensors, name, factor, layer.rank)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ArtifactError(f"{path}: lora_{factor} of {name} is not {list(shape)}. Do not use it.")
            factors.append(tensor)
        step = manifest.report.step_size
        step = paper_step_size(layer.peft_scaling, manifest.config.stable_gamma) if step is None else step
        missed = _missed(factors[0], factors[1], bases[name], scaling=layer.peft_scaling, step=step)
        if not missed <= _TOLERANCE + 4 * max(torch.finfo(tensor.dtype).eps for tensor in factors):
            raise ArtifactError(
                f"{path}: the adapter of {name} is not the step along the stored basis: it misses it by {missed:.1e} "
                "of its size. Do not use it."
            )


def _foreign(path: Path, keys: Collection[str]) -> ArtifactError:
    return ArtifactError(f"{path}: {min(keys)[:160]!r} is not a tensor of this adapter. Do not use it.")


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _is_trained(key: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the config says that a tensor is trained beside the adapter."""
    name = key.removeprefix(PEFT_PREFIX)
    if name == key or ".lora_" in name:
        return False
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        return bool(config["trainable_token_indices"])
    module, _, parameter = name.rpartition(".")
    return (parameter == "bias" and config["bias"] != "none") or is_saved(config, module)


def _missed(lora_A: Tensor, lora_B: Tensor, basis: LayerSolution, *, scaling: float, step: float) -> float:
    """Return how far ``s B A`` is from ``step * basis_B @ basis_A``, relative to the latter, or A from the basis.

    At step 0 B must be zero, and A is free.
    """
    if step == 0.0:
        return math.inf if lora_B.any() else 0.0
    rank = len(lora_A)
    rows, columns = basis.basis_A[:rank].double(), basis.basis_B[:, :rank].double()
    wide_A, wide_B = lora_A.double(), lora_B.double()
    inside = wide_A @ torch.linalg.pinv(rows)  # rows need not be of norm 1
    outside = (wide_A - inside @ rows).norm() / wide_A.norm()
    expected = columns * step
    along = (scaling * (wide_B @ inside) - expected).norm() / expected.norm()
    return torch.maximum(outside, along).item()  # NaN of either stays
