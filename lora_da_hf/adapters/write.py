"""Writing factors into an adapter's own parameters, reading them back, and what is kept of an initialised adapter."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf.adapters.targets import Target, active_adapter_name
from lora_da_hf.distributed.parameters import gathered, is_whole, read_full, write_full
from lora_da_hf.errors import WriteError
from lora_da_hf.theory.steps import product_norm

_MAY_BE_ZERO = "_lora_da_may_be_zero"
"""Attribute of each A of an initialised adapter: whether its B is zero by intention."""


def write_factors(target: Target, lora_A: Tensor, lora_B: Tensor) -> None:
    """Overwrite A ``[r, d_in]`` and B ``[d_out, r]`` of one layer in place, with every copy that an optimizer keeps.

    DoRA's magnitude follows, so that the output is that of ``W + scaling * B A``. Every process must take part.

    Raises:
        WriteError: if what is read back is not what was written.
    """
    _write_checked(target, "lora_A", target.lora_A, lora_A)
    _write_checked(target, "lora_B", target.lora_B, lora_B)
    if target.magnitude is not None:
        weight: Any = target.base_layer.weight
        if is_whole(weight):
            norms = _row_norms(target, dequantize_module_weight(target.base_layer))
        else:
            with gathered(weight) as whole:
                norms = _row_norms(target, whole)
        _write_checked(target, "DoRA's magnitude", target.magnitude.weight, norms)


def _write_checked(target: Target, what: str, parameter: Tensor, value: Tensor) -> None:
    stored = value.to(parameter.device, parameter.dtype)
    if not write_full(parameter, stored) or not torch.isfinite(stored).all():
        raise WriteError(
            f"{target.name}: {what} reads back differently from what was written, or is not finite in "
            f"{parameter.dtype}. Something else owns this parameter, or its optimizer's copy of it."
        )


@torch.no_grad()
def _row_norms(target: Target, weight: Tensor) -> Tensor:
    """Return the norm ``[d_out]`` of each row of ``W + scaling * B A``: DoRA's magnitude at step 0."""
    lora_A, lora_B = read_factors(target)
    product = lora_B @ lora_A
    weight = weight.mT if isinstance(target.base_layer, Conv1D) else weight
    return torch.linalg.norm(weight.to(product) + target.peft_scaling * product, dim=1)


def read_factors(target: Target) -> tuple[Tensor, Tensor]:
    """Return copies of A ``[r, d_in]`` and B ``[d_out, r]`` of one layer."""
    return read_full(target.lora_A), read_full(target.lora_B)


def update_norm(target: Target) -> float:
    """Return the Frobenius norm of ``scaling * B @ A`` as it is stored."""
    return target.peft_scaling * product_norm(*read_factors(target))


def mark_initialized(model: nn.Module, adapter_name: str, *, may_be_zero: bool = False) -> None:
    """Remember that an adapter was initialised, for as long as its modules live; B may be zero if no step helped."""
    for layer in _layers_of(model, adapter_name):
        setattr(layer.lora_A[adapter_name], _MAY_BE_ZERO, may_be_zero)


def was_initialized(model: nn.Module, adapter_name: str) -> bool:
    """Tell whether an adapter was initialised before. One that was deleted and added again, or reset, was not.

    Under ZeRO-3 and FSDP2 all processes look at each layer together.
    """
    layers = [layer for layer in _layers_of(model, adapter_name) if hasattr(layer.lora_A[adapter_name], _MAY_BE_ZERO)]
    if any(getattr(layer.lora_A[adapter_name], _MAY_BE_ZERO) for layer in layers):
        return True
    return any([bool(read_full(layer.lora_B[adapter_name].weight).any()) for layer in layers])


def _layers_of(model: nn.Module, adapter_name: str) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]


def freeze_a(model: nn.Module) -> None:
    """Freeze A of every LoRA layer of the active adapter (LoRA-FA), before the optimizer is made.

    PEFT thaws all of an adapter that is switched on again, as losses do that look at the base model between
    (``disable_adapter``): each layer freezes its A again before it runs.
    """
    name = active_adapter_name(model)
    for layer in _layers_of(model, name):
        if layer.lora_A[name].weight.requires_grad:
            layer.lora_A[name].weight.requires_grad_(False)
            layer.register_forward_pre_hook(functools.partial(_freeze_again, layer.lora_A[name]))


def _freeze_again(lora_A: nn.Linear, *_: Any) -> None:
    if lora_A.weight.requires_grad:  # FSDP2 has another parameter by now
        lora_A.weight.requires_grad_(False)
