"""From a basis and a step to the two factors that are written to the adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_da_hf.config import LoRADAConfig

DEFAULT_ROW_NORM = 1 / math.sqrt(3)
"""Expected norm of a row of A under PEFT's default: kaiming uniform, a = sqrt(5), has entry variance 1 / (3 d_in)."""


def split_factors(
    basis_A: Tensor, basis_B: Tensor, *, peft_scaling: float, step_size: float, factor_split: str
) -> tuple[Tensor, Tensor]:
    """Split ``peft_scaling * lora_B @ lora_A = step_size * basis_B @ basis_A`` into two factors.

    ``basis_A [r, d_in]`` is the transposed input basis, ``basis_B [d_out, r]`` the scaled displacement times it.
    ``"default_norm"`` puts everything but PEFT's default norm in B, ``"orthonormal"`` multiplies both bases with
    ``sqrt(step_size / peft_scaling)``, and ``"balanced"`` shares out the singular values of ``basis_B`` by their roots.
    """
    product_scale = step_size / peft_scaling
    if factor_split == "default_norm":
        return basis_A * DEFAULT_ROW_NORM, basis_B * (product_scale / DEFAULT_ROW_NORM)
    root = math.sqrt(product_scale)
    if factor_split == "orthonormal":
        return basis_A * root, basis_B * root
    left, singular, right = torch.linalg.svd(basis_B, full_matrices=False)
    scaled_A = singular.sqrt()[:, None] * (right @ basis_A) * root
    scaled_B = left * singular.sqrt() * root
    missing = basis_A.shape[0] - singular.shape[0]  # d_out < r: the last directions carry nothing
    return torch.nn.functional.pad(scaled_A, (0, 0, 0, missing)), torch.nn.functional.pad(scaled_B, (0, missing))


def factors_at_step(
    basis_A: Tensor, basis_B: Tensor, config: LoRADAConfig, *, peft_scaling: float, step_size: float | None
) -> tuple[Tensor, Tensor]:
    """Split a basis as the config says: without a step as `stable_gamma` says; at step 0, A spans it and B is zero."""
    if step_size == 0.0:
        return basis_A * DEFAULT_ROW_NORM, torch.zeros_like(basis_B)
    if step_size is None:
        step_size = paper_step_size(peft_scaling, config.stable_gamma)
    return split_factors(
        basis_A, basis_B, peft_scaling=peft_scaling, step_size=step_size, factor_split=config.factor_split
    )


def paper_step_size(peft_scaling: float, stable_gamma: float) -> float:
    """Return the step that the paper's ``stable_gamma`` amounts to: both factors divided by its square root."""
    return peft_scaling / stable_gamma
