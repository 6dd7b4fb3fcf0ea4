"""Tensors with what is needed to read them: a symmetric matrix, the statistics of a layer, and its solution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_FILLS_A_GPU = 2**21
"""Entries of a product that keep a GPU busy: 64 tiles of 128 x 256."""


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite, ten times as fast as `isfinite` does."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


@dataclass(frozen=True, kw_only=True)
class UpperTriangle:
    """A symmetric ``[width, width]`` as strips ``[block, width - start]`` of its upper block triangle.

    Attributes:
        entries: The strips one after the other, in one dimension. With a block of 1 they are the upper triangle.
    """

    entries: Tensor
    width: int
    block: int

    @classmethod
    def zeros(cls, width: int, *, dtype: torch.dtype, device: torch.device) -> UpperTriangle:
        """Make a sum that is empty yet."""
        size, block = cls.size(width, device.type), cls.best_block(width, device.type)
        return cls(entries=torch.zeros(size, dtype=dtype, device=device), width=width, block=block)

    @staticmethod
    def best_block(width: int, device_type: str) -> int:
        """Return how many rows a strip has: few save memory and arithmetic, and many make products fast."""
        if device_type == "cuda":
            return max(256, min(width // 2, _FILLS_A_GPU // width) // 128 * 128)
        return 256 if width >= 1024 else 128

    @classmethod
    def size(cls, width: int, device_type: str) -> int:
        """Return the number of entries, about ``width * (width + block) / 2``."""
        block = cls.best_block(width, device_type)
        return sum(min(block, width - start) * (width - start) for start in range(0, width, block))

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the strip."""
        offset = 0
        for start in range(0, self.width, self.block):
            shape = min(self.block, self.width - start), self.width - start
            yield start, self.entries[offset : offset + shape[0] * shape[1]].view(shape)
            offset += shape[0] * shape[1]

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the symmetric ``[width, width]``."""
        total = self.entries.new_empty(self.width, self.width, dtype=dtype)
        if self.block == 1:  # at once: row by row takes five times as long
            total.masked_scatter_(torch.ones_like(total, dtype=torch.bool).triu_(), self.entries.to(total.dtype))
        for start, strip in self.strips() if self.block > 1 else ():
            total[start : start + len(strip), start:] = strip
        for start in range(0, self.width, 256):
            stop = min(start + 256, self.width)
            diagonal = total[start:stop, start:stop]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
            total[stop:, start:stop] = total[start:stop, stop:].mT
        return total

    def packed(self) -> Tensor:
        """Return the upper triangle row by row, ``[width * (width + 1) / 2]``, on the CPU."""
        moved = dataclasses.replace(self, entries=self.entries.cpu())
        return torch.cat([strip[row, row:] for _, strip in moved.strips() for row in range(len(strip))])


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What one pass over the samples says about one linear layer.

    Attributes:
        input_second_moment: ``[d_in, d_in]``, mean of ``x x^T`` over the tokens that the mask keeps; of a pass, or
            as it is stored, its upper triangle.
        output_grad_second_moment_diag: ``[d_out]``, mean of ``g**2`` over the same tokens, with g the gradient of the
            training objective times the number of samples. So it has the size that it has for one sample alone,
            whatever the batch size: of a mean over labels, g is that of the summed loss, divided by the mean number of
            labels that a sample has.
        weight_grad: ``[d_out, d_in]``, gradient of the training objective over the samples: the mean over their labels,
            or over samples, of the loss.
        input_mean: ``[d_in]``, mean of x over the tokens of the input second moment; None: not kept.
    """

    input_second_moment: Tensor | UpperTriangle
    output_grad_second_moment_diag: Tensor
    weight_grad: Tensor
    num_input_tokens: int
    num_output_tokens: int
    input_mean: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSolution:
    """The start of one layer, up to a maximal rank. Smaller ranks are slices of it.

    Attributes:
        basis_A: ``[max_rank, d_in]``, rows of norm 1, and orthogonal but for ``start="whitened_gradient"``.
        basis_B: ``[d_out, max_rank]``, so that ``basis_B @ basis_A`` is the part of the displacement (of the gradient,
            with ``start="gradient"``) that the rank keeps, or zero. It is scaled as ``layer_steps`` says, and, once all
            layers are solved, divided by a number for each layer (`lora_da_hf.theory.steps.in_one_unit`).
        eigenvalues: ``[max_rank]``, ascending: of the guidance matrix, or the negative ones of what the start leads in.
        displacement_norm: Largest singular value of the displacement, or of the gradient; 1 if there is no step.
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
