"""The stored subspace of each layer, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_hf.artifacts.schema import Manifest
from lora_da_hf.artifacts.tensors import TensorSpecs
from lora_da_hf.records import LayerSolution


@dataclass(frozen=True, kw_only=True)
class StoredBasis:
    """The stored subspace of one layer.

    Attributes:
        basis_A: ``[max_rank, d_in]``, the transposed input basis.
        basis_B: ``[d_out, max_rank]``, what ``basis_A`` keeps of the displacement (`lora_da_hf.records.LayerSolution`).
        eigenvalues: ``[max_rank]``, of the guidance matrix, ascending.
    """

    basis_A: Tensor
    basis_B: Tensor
    eigenvalues: Tensor

    @classmethod
    def of(cls, solution: LayerSolution) -> StoredBasis:
        """Return what is stored of a solution's tensors."""
        return cls(basis_A=solution.basis_A, basis_B=solution.basis_B, eigenvalues=solution.eigenvalues)


def basis_tensors(bases: Mapping[str, StoredBasis]) -> dict[str, Tensor]:
    """Return the tensors of the basis file: ``<layer>.basis_A`` and ``.basis_B`` in float32, ``.eigenvalues`` in 64."""
    tensors: dict[str, Tensor] = {}
    for name, basis in bases.items():
        tensors[f"{name}.basis_A"] = basis.basis_A.to("cpu", torch.float32).contiguous()
        tensors[f"{name}.basis_B"] = basis.basis_B.to("cpu", torch.float32).contiguous()
        tensors[f"{name}.eigenvalues"] = basis.eigenvalues.to("cpu", torch.float64).contiguous()
    return tensors


def basis_specs(manifest: Manifest) -> TensorSpecs:
    """Return shape and dtype of each tensor that the basis file of a manifest holds."""
    return {
        key: (shape, dtype)
        for name, layer in manifest.layers.items()
        for key, shape, dtype in (
            (f"{name}.basis_A", (layer.max_rank, layer.in_features), "F32"),
            (f"{name}.basis_B", (layer.out_features, layer.max_rank), "F32"),
            (f"{name}.eigenvalues", (layer.max_rank,), "F64"),
        )
    }
