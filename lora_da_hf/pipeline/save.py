"""The adapter of a model, as PEFT saves it and with a config that names its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftMixedModel, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from lora_da_hf.adapters.targets import base_name
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX, config_to_store, refuse_unstorable
from lora_da_hf.artifacts.manifest import BaseModelFacts
from lora_da_hf.distributed.parameters import is_partitioned, read_full
from lora_da_hf.errors import TargetError
from lora_da_hf.losses import shifts_labels


def adapter_as_stored(
    model: nn.Module, adapter_name: str, base_model: BaseModelFacts
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors and configuration as PEFT stores them; what is in parts is put together on all.

    The configuration gives layers and ranks by name, and the scaling that all have by `r` and ``lora_alpha``.
    """
    whole = None
    if is_partitioned(model):
        trained = {name: p for name, p in model.named_parameters() if "lora_" in name or p.requires_grad}
        whole = {name: read_full(parameter).cpu() for name, parameter in trained.items()}
    found = get_peft_model_state_dict(model, whole, adapter_name, save_embedding_layers=False)
    prefix = "" if isinstance(model, PeftModel) else PEFT_PREFIX
    tensors = {prefix + name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}
    layers = _layers_by_pattern_name(model, adapter_name)
    modules = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    peft_model: Any = model
    config = {**peft_model.peft_config[adapter_name].to_dict(), "inference_mode": True}
    if config["task_type"] is None and shifts_labels(model):  # a card needs the class of the base
        config["task_type"] = "CAUSAL_LM"
    return tensors, config_to_store(config, base_model, modules, ranks, _common_scaling(layers, adapter_name))


def _layers_by_pattern_name(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers of an adapter by what PEFT matches its patterns with: their names, or their parameters'."""
    found: dict[str, LoraLayer] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            plain = base_name(name)
            is_parameter = isinstance(layer, ParamWrapper)
            found[f"{plain.replace('.base_layer', '')}.{layer.parameter_name}" if is_parameter else plain] = layer
    return found


def _common_scaling(layers: Mapping[str, LoraLayer], adapter_name: str) -> float:
    """Return the scaling that all layers have: some programs that run adapters read `r` and ``lora_alpha`` alone."""
    first, scaling = next((name, layer.scaling[adapter_name]) for name, layer in layers.items())
    for name, layer in layers.items():
        if not math.isclose(layer.scaling[adapter_name], scaling, rel_tol=1e-9):
            raise TargetError(
                f"{name} has scaling {layer.scaling[adapter_name]:.6g} and {first} has {scaling:.6g}: an adapter is "
                "stored with one scaling. Give alpha_pattern for the layers of rank_pattern, so that alpha / r (or its "
                "root with rsLoRA) is the same in all, or call initialize_lora_da without output_dir."
            )
    return scaling


def refuse_unsaveable(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that cannot be stored."""
    if isinstance(model, PeftMixedModel):
        raise TargetError(
            "An adapter made with mixed=True cannot be stored. Make it without: get_peft_model(base, ...)."
        )
    if not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False):
        raise TargetError(
            f"The adapter of a {type(model).__name__} cannot be stored: it is neither what get_peft_model returns nor "
            "a transformers model with an adapter. get_peft_model changes the base in place, and so does "
            "LoRADATrainer's peft_config: give what it returned (trainer.model), or load the base anew. Without "
            "output_dir, initialize_lora_da takes any model."
        )
    refuse_unstorable(model.peft_config[adapter_name])  # pyright: ignore[reportArgumentType, reportIndexIssue]
    _common_scaling(_layers_by_pattern_name(model, adapter_name), adapter_name)
