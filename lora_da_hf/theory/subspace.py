"""The extreme eigenvectors of a symmetric operator: exactly, or by block Krylov with a residual check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]

TOLERANCE = 1e-7
"""Of residuals, relative to the largest eigenvalue."""
_RESOLVED = 30.0
"""Times the residual: eigenvalues below that part of the largest are left to the exact solver."""
_TOLD = 300.0
"""Times the residual: a looser tolerance has to do for eigenvalues above that part of the largest alone."""
_LEAST_BLOCK = 4
_DENSE_BELOW = 384
_CHECKED_FROM = 7
"""Times the vectors that are sought, or blocks where the start is close: a basis of so many is looked at first."""
_CHECKED_FROM_IF_LOOSE = 5
_BLOCKS_FROM_START = 4
_START_SEED = 0
_COLUMNS = 256
"""Of the identity, that an operator is applied to at once."""


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Some eigenpairs of a symmetric matrix.

    Attributes:
        vectors: ``[d, k]``, orthonormal columns, the entry of largest magnitude of each being positive.
        residual: Largest ``||M v - lambda v||``, relative to the largest magnitude among the eigenvalues found.
    """

    eigenvalues: Tensor
    vectors: Tensor
    residual: float
    solver: str


def leading_eigenpairs(
    apply: Apply, count: int, *, like: Tensor, tolerance: float = TOLERANCE, start: Tensor | None = None
) -> Eigenpairs:
    """Find the algebraically largest eigenpairs of a symmetric operator on ``[d, k]``, in descending order.

    By `block_krylov` where that is faster, and by `exact_eigenpairs` elsewhere, where the residual stays above the
    tolerance, and where an eigenvalue is too small to be told by it. The work has the dtype, the device and the last
    dimension, d, of ``like``.
    """
    if like.shape[-1] > _DENSE_BELOW and 16 * count < like.shape[-1]:
        found = block_krylov(apply, count, like=like, tolerance=tolerance, start=start)
        sizes = found.eigenvalues.abs()  # the residual is relative to the largest: too small ones are left unresolved
        if found.residual <= tolerance and not sizes.min() < _RESOLVED * found.residual * sizes.max():
            return found
    return exact_eigenpairs(apply, count, like=like)


def exact_eigenpairs(apply: Apply, count: int, *, like: Tensor) -> Eigenpairs:
    """Find the largest eigenpairs exactly: the operator is applied to the identity, some columns at a time."""
    dimension = like.shape[-1]
    matrix = like.new_empty(dimension, dimension)
    for start in range(0, dimension, _COLUMNS):
        unit = like.new_zeros(dimension, min(_COLUMNS, dimension - start))
        unit.diagonal(-start).fill_(1.0)
        matrix[:, start : start + _COLUMNS] = apply(unit)
    matrix = (matrix + matrix.mT).mul_(0.5)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues, vectors = eigenvalues.flip(0)[:count], vectors.flip(1)[:, :count]
    residual = relative_residual(matrix @ vectors, vectors, eigenvalues)
    return Eigenpairs(eigenvalues=eigenvalues, vectors=fix_signs(vectors), residual=residual, solver="eigh")


def block_krylov(
    apply: Apply, count: int, *, like: Tensor, tolerance: float = TOLERANCE, start: Tensor | None = None
) -> Eigenpairs:
    """Find the largest eigenpairs by block Lanczos with full reorthogonalisation.

    The start block is random with a fixed seed, so the same operator gives the same bits. The basis grows until the
    residual meets the tolerance, or it spans half of the space, where an exact solver is cheaper. ``start [d, k]`` are
    orthonormal vectors close to those that are sought. Of an eigenvalue that more vectors share than a block has, some
    can be missed: blocks are half as wide as what is sought, since wider ones take more work for the same residual.
    """
    dimension = like.shape[-1]
    block_size = min(max(count // 2, _LEAST_BLOCK), dimension)
    largest = max(dimension // 2, block_size)
    generator = torch.Generator().manual_seed(_START_SEED)
    block = torch.randn(dimension, block_size, generator=generator, dtype=torch.float64).to(like)
    checked_from = (_CHECKED_FROM if tolerance <= TOLERANCE else _CHECKED_FROM_IF_LOOSE) * count
    if start is not None:
        given = min(start.shape[1], block_size // 2)
        block[:, :given] = start[:, :given]
        checked_from = _BLOCKS_FROM_START * block_size
    block = torch.linalg.qr(block).Q.mT
    basis = image = block[:0]  # a vector to each row
    while True:
        basis = torch.cat([basis, block])
        image = torch.cat([image, apply(block.mT).mT])
        full = len(basis) + block_size > largest
        if full or len(basis) >= checked_from:
            projected = basis @ image.mT
            values, coordinates = torch.linalg.eigh((projected + projected.mT) * 0.5)
            values, coordinates = values.flip(0)[:count], coordinates.flip(1)[:, :count].mT
            vectors = (coordinates @ basis).mT
            residual = relative_residual((coordinates @ image).mT, vectors, values)
            told = residual <= TOLERANCE or _TOLD * residual * values.abs().max() <= values.abs().min()
            if (residual <= tolerance and told) or full:
                return Eigenpairs(eigenvalues=values, vectors=fix_signs(vectors), residual=residual, solver="krylov")
        block = _orthonormal_part(image[-block_size:], basis)


def _orthonormal_part(block: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows that span the part of the rows of ``block`` that is orthogonal to those of ``basis``."""
    for _ in range(2):
        block = block - (block @ basis.mT) @ basis
        block = torch.linalg.qr(block.mT).Q.mT
    return block


def relative_residual(image: Tensor, vectors: Tensor, eigenvalues: Tensor) -> float:
    """Return the largest ``||M v - lambda v||`` over ``vectors [d, k]``, relative to the largest ``|lambda|``."""
    largest = eigenvalues.abs().max().clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return ((image - vectors * eigenvalues) / largest).norm(dim=0).max().item()


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns of ``vectors [d, k]`` so that the entry of largest magnitude of each is positive."""
    pivot = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, pivot).sign()
