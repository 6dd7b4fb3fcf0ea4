"""The stored subspace of each layer, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.tensors import TensorSpecs
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport


@dataclass(frozen=True, kw_only=True)
class StoredBasis:
    """``basis_A [max_rank, d_in]`` and ``basis_B [d_out, max_rank]`` of a `LayerSolution`; the report has the rest."""

    basis_A: Tensor
    basis_B: Tensor


def stored_solution(basis: StoredBasis, report: LayerReport) -> LayerSolution:
    """Put the solution of a layer together from what is stored of it."""
    return LayerSolution(
        basis_A=basis.basis_A,
        basis_B=basis.basis_B,
        eigenvalues=torch.tensor(report.eigenvalues, dtype=torch.float64, device=basis.basis_A.device),
        displacement_norm=report.displacement_norm,
        input_damping=report.input_damping,
        output_damping=report.output_damping,
        solver=report.solver,
        residual=report.residual,
    )


def basis_tensors(bases: Mapping[str, StoredBasis | LayerSolution]) -> dict[str, Tensor]:
    """Return the tensors of the basis file: ``<layer>.basis_A`` and ``<layer>.basis_B`` in float32."""
    named = {f"{name}.{part}": getattr(basis, part) for name, basis in bases.items() for part in ("basis_A", "basis_B")}
    return {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in named.items()}


def basis_specs(manifest: Manifest) -> TensorSpecs:
    """Return shape and dtype of each tensor that the basis file of a manifest holds."""
    return {
        key: (shape, "F32")
        for name, layer in manifest.layers.items()
        for key, shape in (
            (f"{name}.basis_A", (layer.max_rank, layer.in_features)),
            (f"{name}.basis_B", (layer.out_features, layer.max_rank)),
        )
    }
