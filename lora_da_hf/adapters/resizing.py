"""Other ranks for the layers of an adapter, before an optimizer holds its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_da_hf.adapters.targets import Target, base_name
from lora_da_hf.distributed.parameters import is_whole
from lora_da_hf.errors import TargetError, UnsupportedSetupError


def layers_in_patterns(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers of an adapter by the names that PEFT matches its patterns with.

    That is a layer's name, or that of the parameter that it adapts.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {_name_in_patterns(name, layer): layer for name, layer in layers.items() if adapter_name in layer.r}


def _name_in_patterns(name: str, layer: LoraLayer) -> str:
    if isinstance(layer, ParamWrapper):
        return f"{base_name(name).replace('.base_layer', '')}.{layer.parameter_name}"
    return base_name(name)


def trained_factors(target: Target) -> tuple[bool, bool]:
    """Tell whether A and B are trained."""
    return target.lora_A.requires_grad, target.lora_B.requires_grad


def with_rank(target: Target, rank: int, *, peft_scaling: float, trained: tuple[bool, bool]) -> Target:
    """Return a target with new factors of zeros at another rank, which its layer does not have yet.

    Args:
        target: The layer as it is.
        rank: The new rank.
        peft_scaling: The scaling at that rank.
        trained: Whether the new A and B are trained, which the old ones do not tell while they are frozen for a pass.
    """
    shapes = ((rank, target.in_features), (target.out_features, rank))
    factors = [
        nn.Parameter(old.new_zeros(shape), requires_grad=requires_grad)
        for old, shape, requires_grad in zip((target.lora_A, target.lora_B), shapes, trained, strict=True)
    ]
    return dataclasses.replace(target, rank=rank, peft_scaling=peft_scaling, lora_A=factors[0], lora_B=factors[1])


def put_in(target: Target, *, alpha: float) -> None:
    """Make the factors, the rank and the scaling of a target those of its layer.

    Args:
        target: What `with_rank` returned, or the target that it was called with, to undo it.
        alpha: PEFT's alpha for that rank and scaling.
    """
    layer: Any = target.layer
    name = target.adapter_name
    layer.lora_A[name].weight, layer.lora_B[name].weight = target.lora_A, target.lora_B
    layer.lora_A[name].out_features = layer.lora_B[name].in_features = target.rank
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = target.rank, alpha, target.peft_scaling


def check_resizable(targets: list[Target]) -> None:
    """Verify that the layers can get other ranks.

    Raises:
        TargetError: for experts, which share one parameter.
        UnsupportedSetupError: if DeepSpeed or FSDP2 has the parameters in its hands already.
    """
    for target in targets:
        if target.is_routed:
            raise TargetError(
                f"{target.name}: the experts of a layer share one parameter and one rank, so a rank_budget cannot be "
                "shared out. Leave rank_budget or target_parameters out."
            )
        if not is_whole(target.lora_A):
            raise UnsupportedSetupError(CANNOT_RESIZE.format(f"{target.name}: DeepSpeed or FSDP2 has the parameters"))


CANNOT_RESIZE = (
    "{}, and a rank_budget gives the layers other ones. Compute an initialisation with a max_rank and no budget, "
    "share it out with `lora-da refit --rank-budget` (refit_init), and load the adapter that it writes with "
    "PeftModel.from_pretrained(base, folder, is_trainable=True); or call initialize_lora_da in one process, before the "
    "trainer is made."
)
"""Why a rank_budget is refused where parameters are in use already; with a place for who uses them."""
