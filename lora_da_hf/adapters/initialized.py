"""What is kept of an initialised adapter for as long as it lives: that it was initialised, and that its A is frozen."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from lora_da_hf.adapters.targets import active_adapter_name
from lora_da_hf.distributed.parameters import read_full

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
    if not layers or any(_initialized[layer.lora_A[adapter_name]] for layer in layers):
        return bool(layers)
    return any([bool(read_full(layer.lora_B[adapter_name].weight).any()) for layer in layers])


def _layers_of(model: nn.Module, adapter_name: str) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]


_kept_frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def freeze_a(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Freeze A of every LoRA layer (LoRA-FA), before the optimizer is made, and return what was not frozen before.

    PEFT thaws all of an adapter that is switched on again, as losses do that look at the base model between
    (``disable_adapter``): each layer freezes its A again before it runs.
    """
    adapter_name = adapter_name or active_adapter_name(model)
    frozen: list[nn.Parameter] = []
    for layer in _layers_of(model, adapter_name):
        lora_A: Any = layer.lora_A[adapter_name]
        if lora_A.weight.requires_grad:
            frozen.append(lora_A.weight.requires_grad_(False))
        if lora_A not in _kept_frozen:
            _kept_frozen.add(lora_A)
            layer.register_forward_pre_hook(functools.partial(_freeze_again, lora_A=lora_A))
    return frozen


def _freeze_again(_: nn.Module, args: Any, *, lora_A: nn.Linear) -> None:
    if lora_A.weight.requires_grad:
        lora_A.weight.requires_grad_(False)
