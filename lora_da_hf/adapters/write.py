"""Writing factors into an adapter's own parameters, reading them back, and what is kept of an initialised adapter."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Generator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf.adapters.targets import Target, active_adapter_name
from lora_da_hf.distributed.parameters import full_shape, gathered, is_whole, read_full, write_full
from lora_da_hf.errors import UnsupportedSetupError, WriteError


def write_factors(target: Target, lora_A: Tensor, lora_B: Tensor) -> None:
    """Overwrite A ``[r, d_in]`` and B ``[d_out, r]`` of one layer in place, with every copy that an optimizer keeps.

    DoRA's magnitude follows, so that the output is that of ``W + scaling * B A``. Every process must take part.

    Raises:
        WriteError: if the shapes differ, or what is read back is not what was written.
    """
    for what, parameter, value in (("lora_A", target.lora_A, lora_A), ("lora_B", target.lora_B, lora_B)):
        shape = full_shape(parameter)
        if shape != value.shape:
            raise WriteError(
                f"{target.name}: {what} has shape {list(shape)} and the initialisation {list(value.shape)}. "
                "The adapter changed since the statistics were taken."
            )
        stored = value.to(parameter.device, parameter.dtype)
        if not write_full(parameter, stored) or not torch.isfinite(stored).all():
            raise WriteError(
                f"{target.name}: {what} reads back differently from what was written, or is not finite in "
                f"{parameter.dtype}. Something else owns this parameter, or its optimizer's copy of it."
            )
    if target.magnitude is not None:
        _match_magnitude(target, target.magnitude)


def _match_magnitude(target: Target, magnitude: DoraLinearLayer) -> None:
    """Set DoRA's magnitude to the norm of each row of ``W + scaling * B A``."""
    lora_A, lora_B = read_factors(target)
    parameter: Any = magnitude.weight
    with _whole_weight(target) as weight:
        norm = dora_magnitude(target.base_layer, lora_A, lora_B, target.peft_scaling, weight)
    if not write_full(parameter, norm.to(parameter.device, parameter.dtype)):
        raise WriteError(
            f"{target.name}: DoRA's magnitude reads back differently from what was written. Something else owns this "
            "parameter, or its optimizer's copy of it."
        )


@contextlib.contextmanager
def _whole_weight(target: Target) -> Generator[Tensor | None]:
    """Give the base layer's weight inside the context, in floating point; None: the layer has it as a whole."""
    parameter: Any = target.base_layer.weight
    if is_whole(parameter):
        yield None
        return
    with gathered(parameter) as whole:
        if not whole.is_floating_point() or whole.numel() != target.in_features * target.out_features:
            raise UnsupportedSetupError(
                f"{target.name}: its base weight is quantised and in parts, so DoRA's magnitude cannot follow from it. "
                "Use LoRA, or initialise in one process."
            )
        yield whole


@torch.no_grad()
def dora_magnitude(
    base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Tensor | None = None
) -> Tensor:
    """Return the norm ``[d_out]`` of each row of ``W + scaling * B A``: DoRA's magnitude at step 0."""
    weight = dequantize_module_weight(base_layer) if weight is None else weight
    product = lora_B @ lora_A
    weight = weight.mT if isinstance(base_layer, Conv1D) else weight
    return torch.linalg.norm(weight.to(product) + scaling * product, dim=1)


def read_factors(target: Target) -> tuple[Tensor, Tensor]:
    """Return copies of A ``[r, d_in]`` and B ``[d_out, r]`` of one layer."""
    return read_full(target.lora_A), read_full(target.lora_B)


def update_norm(target: Target) -> float:
    """Return the Frobenius norm of ``scaling * B @ A`` as it is stored."""
    a, b = (factor.double() for factor in read_factors(target))
    gram = (b.mT @ b) * (a @ a.mT)
    return target.peft_scaling * gram.sum().clamp_min(0).sqrt().item()


_initialized: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Modules of A, each with whether its B is zero by intention."""


def mark_initialized(model: nn.Module, adapter_name: str, *, may_be_zero: bool = False) -> None:
    """Remember that an adapter was initialised, for as long as its modules live; B may be zero if no step helped."""
    _initialized.update({layer.lora_A[adapter_name]: may_be_zero for layer in _layers_of(model, adapter_name)})


def was_initialized(model: nn.Module, adapter_name: str) -> bool:
    """Tell whether an adapter was initialised before. One that was deleted and added again, or reset, was not.

    Under ZeRO-3 and FSDP2 all processes look at each layer together.
    """
    layers = [layer for layer in _layers_of(model, adapter_name) if layer.lora_A[adapter_name] in _initialized]
    if any(_initialized[layer.lora_A[adapter_name]] for layer in layers):
        return True
    return any([bool(read_full(layer.lora_B[adapter_name].weight).any()) for layer in layers])


def _layers_of(model: nn.Module, adapter_name: str) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]


def freeze_a(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Freeze A of every LoRA layer (LoRA-FA), before the optimizer is made, and return what was not frozen before.

    PEFT thaws all of an adapter that is switched on again, as losses do that look at the base model between
    (``disable_adapter``): each layer freezes its A again before it runs.
    """
    name = adapter_name or active_adapter_name(model)
    frozen: list[nn.Parameter] = []
    for layer in _layers_of(model, name):
        lora_A = layer.lora_A[name]
        if lora_A.weight.requires_grad:
            frozen.append(lora_A.weight.requires_grad_(False))
            layer.register_forward_pre_hook(functools.partial(_freeze_again, lora_A=lora_A))
    return frozen


def _freeze_again(_: nn.Module, args: Any, *, lora_A: nn.Linear) -> None:
    if lora_A.weight.requires_grad:
        lora_A.weight.requires_grad_(False)
