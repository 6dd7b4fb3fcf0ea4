"""How far one step goes in each layer, and the two factors that take it there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_da_hf.config import LoRADAConfig
from lora_da_hf.records import LayerSolution
from lora_da_hf.report import LayerReport

_FARTHEST = 100.0
"""How many times as far as the median layer one may go. On SmolLM2-135M the farthest goes 5 times as far."""

_HARDLY = 1e-3

DEFAULT_ROW_NORM = 1 / math.sqrt(3)
"""Expected norm of a row of A under PEFT's default: kaiming uniform, a = sqrt(5), has entry variance 1 / (3 d_in)."""


def layer_lengths(layers: Collection[LayerReport], *, layer_steps: str) -> dict[str, float]:
    """Return how far layers go beside each other, by name, before one number is chosen for all.

    The Fisher information of a layer is ``T Y (x) S``, with T tokens and the mean factors Y and S. The displacement is
    taken with the means, so a layer goes as far as its displacement over T. That goes as one over the gradient, so a
    layer whose gradient is only rounding, such as the router of a mixture that picks one expert, would go farthest of
    all. What is more than a hundred times the median is taken for that and gets a thousandth of the median.
    """
    if layer_steps == "equal":
        return {layer.name: 1.0 for layer in layers}
    lengths = {layer.name: layer.displacement_norm / layer.num_grad_tokens for layer in layers}
    median = statistics.median_high(lengths.values())  # of two layers the longer: nothing tells which is off
    return {name: length if length <= _FARTHEST * median else _HARDLY * median for name, length in lengths.items()}


def rounding_notes(layers: Collection[LayerReport], *, layer_steps: str) -> list[str]:
    """Return a note for the report if the gradients of some layers seem to be only rounding."""
    lengths = layer_lengths(layers, layer_steps=layer_steps)
    found = [one.name for one in layers if lengths[one.name] < one.displacement_norm / one.num_grad_tokens]
    if layer_steps == "equal" or not found:
        return []
    return [
        f"{found[0]} and {len(found) - 1} other layers hardly move: their displacements are more than {_FARTHEST:.0f} "
        "times as long as the median layer's, as where a gradient is nothing but rounding"
    ]


def in_one_unit(
    solutions: Mapping[str, LayerSolution], layers: Mapping[str, LayerReport], *, layer_steps: str
) -> tuple[dict[str, LayerSolution], dict[str, LayerReport], float]:
    """Bring each layer to its length, and divide all by the longest, so that a step of 1 moves that one by norm 1.

    The norm is the whole displacement's, of which the subspace keeps a part, so the unit does not depend on the rank.
    With ``layer_steps="equal"`` each displacement was divided by its own norm before. The unit is returned too.
    """
    if layer_steps == "equal":
        return dict(solutions), dict(layers), 1.0
    lengths = layer_lengths(layers.values(), layer_steps=layer_steps)
    unit = max(lengths.values())
    divisors = {name: unit * (layer.displacement_norm / lengths[name]) for name, layer in layers.items()}
    scaled = {name: solutions[name].in_unit(divisor) for name, divisor in divisors.items()}
    reports = {name: replace(layers[name], eigenvalues=one.eigenvalues.tolist()) for name, one in scaled.items()}
    return scaled, reports, unit


def split_factors(
    basis_A: Tensor, basis_B: Tensor, *, peft_scaling: float, step_size: float, factor_split: str
) -> tuple[Tensor, Tensor]:
    """Split ``peft_scaling * lora_B @ lora_A = step_size * basis_B @ basis_A`` into two factors.

    ``basis_A [r, d_in]`` and ``basis_B [d_out, r]`` are those of `LayerSolution`.
    ``"default_norm"`` puts everything but PEFT's default norm in B, ``"orthonormal"`` multiplies both bases with
    ``sqrt(step_size / peft_scaling)``, and ``"balanced"`` shares out the singular values of the update by their roots.
    """
    product_scale = step_size / peft_scaling
    if factor_split == "default_norm":
        return basis_A * DEFAULT_ROW_NORM, basis_B * (product_scale / DEFAULT_ROW_NORM)
    root = math.sqrt(product_scale)
    if factor_split == "orthonormal":
        return basis_A * root, basis_B * root
    orthonormal, mixing = torch.linalg.qr(basis_A.mT)
    left, singular, right = torch.linalg.svd(basis_B @ mixing.mT, full_matrices=False)
    scaled_A = singular.sqrt()[:, None] * (right @ orthonormal.mT) * root
    scaled_B = left * singular.sqrt() * root
    missing = basis_A.shape[0] - singular.shape[0]  # d_out < r: the last directions carry nothing
    return torch.nn.functional.pad(scaled_A, (0, 0, 0, missing)), torch.nn.functional.pad(scaled_B, (0, missing))


def product_norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """Return the Frobenius norm of ``lora_B @ lora_A`` for ``lora_A [r, d_in]`` and ``lora_B [d_out, r]``."""
    rows, columns = lora_A.double(), lora_B.double()
    return ((rows @ rows.mT) * (columns.mT @ columns)).sum().clamp_min(0).sqrt().item()


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
