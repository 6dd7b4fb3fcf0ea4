"""How far training moves an adapter, and what is left of its start when it ends."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.targets import find_targets


@dataclass(frozen=True)
class Factors:
    """A layer's adapter at one time: ``scaling * B A`` is added to the weight."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def read_factors(model: nn.Module) -> dict[str, Factors]:
    """Copy the factors of every layer with an adapter, in float32 on the CPU."""
    return {
        target.name: Factors(
            target.lora_A.detach().float().cpu().clone(),
            target.lora_B.detach().float().cpu().clone(),
            target.peft_scaling,
        )
        for target in find_targets(model).targets
    }


def movement(
    before: dict[str, Factors], after: dict[str, Factors], other: dict[str, Factors] | None = None
) -> dict[str, float | None]:
    """Compare the adapters of a model at two times.

    Args:
        before: Where training began.
        after: Where it ended.
        other: A start that it could have had instead.

    Returns:
        Medians over the layers: ``start``, the spectral norm of what the adapter adds to the weight before; ``moved``,
        that of what it adds after less what it added before; ``subspace_kept``, the share of A's squared norm after
        that lies in the span of its rows before; ``start_kept``, how much of what it added before is in what it adds
        after (their inner product over the squared norm of the former), None if it added nothing; ``other_found``, the
        same for what the other start adds.
    """
    names = ("start", "moved", "subspace_kept", "start_kept", "other_found")
    found: dict[str, list[float]] = {name: [] for name in names}
    for name, old in before.items():
        new = after[name]
        found["start"].append(old.scaling * product_norm(old.lora_B, old.lora_A))
        change = torch.cat([new.lora_B, -old.lora_B], dim=1), torch.cat([new.lora_A, old.lora_A])
        found["moved"].append(old.scaling * product_norm(*change))
        basis = torch.linalg.qr(old.lora_A.T).Q
        found["subspace_kept"].append(((new.lora_A @ basis).square().sum() / new.lora_A.square().sum()).item())
        size = inner_product(old, old)
        if size > 0:
            found["start_kept"].append(inner_product(new, old) / size)
        other_size = 0.0 if other is None else inner_product(other[name], other[name])
        if other is not None and other_size > 0:
            found["other_found"].append(inner_product(new, other[name]) / other_size)
    return {name: statistics.median(values) if values else None for name, values in found.items()}


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return the spectral norm of a product of a tall and a wide matrix, without making it."""
    return torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T, ord=2).item()


def inner_product(one: Factors, other: Factors) -> float:
    """Return the inner product of ``B A`` of one and of another adapter, without making them."""
    return ((one.lora_B.T @ other.lora_B) * (one.lora_A @ other.lora_A.T)).sum().item()
