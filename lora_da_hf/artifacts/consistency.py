"""The checks that need more than one file: basis, adapter and report must tell one story."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.other_tensors import MAGNITUDE, check_other_tensors
from lora_da_hf.artifacts.peft_config import expert_of, holder_of
from lora_da_hf.artifacts.strict_json import malformed
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import LayerReport
from lora_da_hf.theory.adapter_factors import paper_step_size

_ADAPTER_TOLERANCE = 1e-4
"""Relative; and four roundings of the adapter's dtype."""


def check_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    bases: Mapping[str, StoredBasis],
    config: dict[str, Any],
    manifest: Manifest,
) -> None:
    """Verify that ``s B A`` of each layer is the step times the basis at its rank, and the rest what PEFT starts with.

    Args:
        path: The adapter's file, for messages.
        tensors: Its tensors, finite ones.
        bases: By layer, checked.
        config: The checked adapter config.
        manifest: Of the folder.

    Raises:
        ArtifactError: naming the tensor.
    """
    known: set[str] = set()
    for name, layer in manifest.layers.items():
        factors: list[Tensor] = []
        for factor, shape in (("A", (layer.rank, layer.in_features)), ("B", (layer.out_features, layer.rank))):
            tensor = stored_factor(tensors, name, factor, layer.rank)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                found = "missing" if tensor is None else f"{list(tensor.shape)}"
                raise ArtifactError(
                    f"{path}: lora_{factor} of {name} is {found}, not {list(shape)} as the manifest says. "
                    "Fetch it again."
                )
            known.add(_key(name, factor))
            factors.append(tensor)
        if config.get("use_dora"):
            _check_magnitude(path, tensors, name, layer)
        missed = _missed(factors[0], factors[1], bases[name], layer, _step(manifest, layer))
        tolerance = _ADAPTER_TOLERANCE + 4 * max(torch.finfo(tensor.dtype).eps for tensor in factors)
        if not missed <= tolerance:
            raise ArtifactError(
                f"{path}: the adapter of {name} is not the step of the manifest along the stored basis: it misses it "
                f"by {missed:.1e} of its size. Fetch it again."
            )
    check_other_tensors(path, tensors, known, config, manifest)


def _check_magnitude(path: Path, tensors: Mapping[str, Tensor], name: str, layer: LayerReport) -> None:
    tensor = tensors.get(f"{PEFT_PREFIX}{name}{MAGNITUDE}")
    if tensor is None or tensor.numel() != layer.out_features:
        raise malformed(f"{path}: DoRA's magnitude of {name} is missing or of another size")


def stored_factor(tensors: Mapping[str, Tensor], name: str, factor: str, rank: int) -> Tensor | None:
    """Return a layer's A or B out of the tensors of an adapter's file; None if it is not there.

    Args:
        tensors: Of the file.
        name: The layer.
        factor: ``"A"`` or ``"B"``.
        rank: Of the layer.
    """
    tensor = tensors.get(_key(name, factor))
    if tensor is not None and holder_of(name) != name:
        return _of_expert(tensor, factor, rank, expert_of(name))
    return tensor


def _key(name: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{holder_of(name)}.lora_{factor}.weight"


def _of_expert(tensor: Tensor, factor: str, rank: int, index: int) -> Tensor:
    """Return one expert's part of the factor of all experts, which PEFT stores by rows of A and columns of B."""
    if factor == "A":
        return tensor[index * rank : (index + 1) * rank]
    return tensor[:, index :: max(tensor.shape[-1] // rank, 1)]


def _step(manifest: Manifest, layer: LayerReport) -> float:
    step = manifest.report.step_size
    return paper_step_size(layer.peft_scaling, manifest.config.stable_gamma) if step is None else step


def _missed(lora_A: Tensor, lora_B: Tensor, basis: StoredBasis, layer: LayerReport, step: float) -> float:
    """Return how far ``s B A`` is from ``step * basis_B @ basis_A``, relative to the latter.

    Of a step of 0, any B that is not zero misses it wholly, and so does an A outside of the basis at every step.
    """
    rows = basis.basis_A[: layer.rank].double()
    columns = basis.basis_B[:, : layer.rank].double()
    wide_A, wide_B = lora_A.double(), lora_B.double()
    inside = wide_A @ torch.linalg.pinv(rows)
    outside = (wide_A - inside @ rows).norm() / wide_A.norm()
    if step == 0.0:
        return math.inf if wide_B.any() else outside.item()
    expected = columns * step
    along = (layer.peft_scaling * (wide_B @ inside) - expected).norm() / expected.norm()
    return torch.maximum(outside, along).item()  # NaN of either stays
