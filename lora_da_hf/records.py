"""Tensors with what is needed to read them: statistics of a layer, and its solution."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What one pass over the samples says about one linear layer.

    Attributes:
        input_second_moment: ``[d_in, d_in]``, mean of ``x x^T`` over the tokens that the mask keeps.
        output_grad_second_moment_diag: ``[d_out]``, mean of ``g**2`` over the same tokens, with g the gradient of the
            training objective times the number of samples. So it has the size that it has for one sample alone,
            whatever the batch size: of a mean over labels, g is that of the summed loss, divided by the mean number of
            labels that a sample has.
        weight_grad: ``[d_out, d_in]``, gradient of the training objective over the samples: the mean over their labels,
            or over samples, of the loss.
    """

    input_second_moment: Tensor
    output_grad_second_moment_diag: Tensor
    weight_grad: Tensor
    num_input_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, kw_only=True)
class LayerSolution:
    """The best starting subspace of one layer, up to a maximal rank. Smaller ranks are slices of it.

    Attributes:
        basis_A: ``[max_rank, d_in]``, orthonormal rows: the transposed input basis.
        basis_B: ``[d_out, max_rank]``, the displacement times the input basis, so ``basis_B @ basis_A`` is the part of
            it that the subspace keeps. It is scaled as ``layer_steps`` says, and, once all layers are solved, divided
            by a number for each layer (`lora_da_hf.theory.steps.in_one_unit`).
        eigenvalues: ``[max_rank]``, of the guidance matrix, ascending.
        displacement_norm: Largest singular value of the displacement.
        residual: That of the eigensolver, relative to the largest eigenvalue.
    """

    basis_A: Tensor
    basis_B: Tensor
    eigenvalues: Tensor
    displacement_norm: float
    input_damping: float
    output_damping: float
    solver: str
    residual: float
    notes: tuple[str, ...] = ()

    def on(self, device: torch.device | str) -> LayerSolution:
        """Return the solution with its tensors on a device."""
        return dataclasses.replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def in_unit(self, unit: float) -> LayerSolution:
        """Return the solution for a displacement that is divided by a number."""
        return dataclasses.replace(self, basis_B=self.basis_B / unit, eigenvalues=self.eigenvalues / unit**2)

    def at_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return ``basis_A [rank, d_in]`` and ``basis_B [d_out, rank]``."""
        return self.basis_A[:rank], self.basis_B[:, :rank]
