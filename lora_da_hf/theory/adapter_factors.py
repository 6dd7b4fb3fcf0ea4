"""From a basis and a step to the two factors that are written to the adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEFAULT_ROW_NORM = 1 / math.sqrt(3)
"""Expected norm of a row of A under PEFT's default: kaiming uniform, a = sqrt(5), has entry variance 1 / (3 d_in)."""


def split_factors(
    basis_A: Tensor, basis_B: Tensor, *, peft_scaling: float, step_size: float, factor_split: str
) -> tuple[Tensor, Tensor]:
    """Split ``peft_scaling * lora_B @ lora_A = step_size * basis_B @ basis_A`` into two factors.

    Args:
        basis_A: ``[r, d_in]``, the transposed input basis.
        basis_B: ``[d_out, r]``, the normalised displacement times the input basis.
        peft_scaling: The scaling that PEFT multiplies the product with.
        step_size: How far step 0 goes.
        factor_split: ``"default_norm"``: rows of A at PEFT's default norm, everything else in B;
            ``"orthonormal"``: both bases times ``sqrt(step_size / peft_scaling)``; ``"balanced"``: by the singular
            value decomposition of ``basis_B``, each factor taking the square roots.

    Returns:
        ``lora_A [r, d_in]`` and ``lora_B [d_out, r]``.
    """
    product_scale = step_size / peft_scaling
    if factor_split == "default_norm":
        return basis_A * DEFAULT_ROW_NORM, basis_B * (product_scale / DEFAULT_ROW_NORM)
    root = math.sqrt(product_scale)
    if factor_split == "balanced":
        left, singular, right = torch.linalg.svd(basis_B, full_matrices=False)
        rank = basis_A.shape[0]
        scaled_A = singular.sqrt()[:, None] * (right @ basis_A) * root
        scaled_B = left * singular.sqrt() * root
        missing = rank - singular.shape[0]  # d_out < r: the last directions carry nothing
        if missing:
            scaled_A = torch.cat([scaled_A, scaled_A.new_zeros(missing, scaled_A.shape[1])])
            scaled_B = torch.cat([scaled_B, scaled_B.new_zeros(scaled_B.shape[0], missing)], dim=1)
        return scaled_A, scaled_B
    return basis_A * root, basis_B * root


def paper_step_size(peft_scaling: float, stable_gamma: float) -> float:
    """Return the step that the paper's ``stable_gamma`` amounts to: both factors divided by its square root."""
    return peft_scaling / stable_gamma
