"""The file that holds the subspace of each layer; the manifest has the rest of its solution."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.records import LayerSolution


def basis_tensors(solutions: Mapping[str, LayerSolution]) -> dict[str, Tensor]:
    """Return the tensors of the basis file: ``<layer>.basis_A`` and ``<layer>.basis_B`` in float32."""
    named = {f"{n}.{part}": getattr(layer, part) for n, layer in solutions.items() for part in ("basis_A", "basis_B")}
    return {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in named.items()}


def read_solutions(path: Path, manifest: Manifest) -> dict[str, LayerSolution]:
    """Put the solutions together from the basis file and the manifest."""
    shapes = {f"{name}.basis_A": (layer.max_rank, layer.in_features) for name, layer in manifest.layers.items()}
    shapes |= {f"{name}.basis_B": (layer.out_features, layer.max_rank) for name, layer in manifest.layers.items()}
    tensors = read_tensors(path, {key: (shape, "F32") for key, shape in shapes.items()})
    return {
        name: LayerSolution(
            basis_A=tensors[f"{name}.basis_A"],
            basis_B=tensors[f"{name}.basis_B"],
            eigenvalues=torch.tensor(layer.eigenvalues, dtype=torch.float64),
            displacement_norm=layer.displacement_norm,
            input_damping=layer.input_damping,
            output_damping=layer.output_damping,
            solver=layer.solver,
            residual=layer.residual,
        )
        for name, layer in manifest.layers.items()
    }
