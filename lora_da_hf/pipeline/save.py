"""The adapter of a model, as PEFT saves it and with a config that names its layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from lora_da_hf.adapters.targets import base_name
from lora_da_hf.artifacts.adapter_config import config_to_store, refuse_unstorable
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE, BaseModelFacts
from lora_da_hf.distributed.parameters import is_partitioned, read_full
from lora_da_hf.errors import TargetError

_BESIDE_AN_ADAPTER = ("README.md", "generation_config.json", "*.py")
"""What PEFT and transformers write with an adapter: a card as of a trained one, how the base generates, code."""


def whole_adapter(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the whole trained parameters if some are partitioned; None if the model's own will do."""
    if not is_partitioned(model):
        return None
    return {name: read_full(p).cpu() for name, p in model.named_parameters() if "lora_" in name or p.requires_grad}


def save_adapter(
    model: nn.Module,
    folder: Path,
    adapter_name: str,
    state: dict[str, Tensor] | None,
    base_model: BaseModelFacts,
) -> None:
    """Save one adapter as PEFT does, into the folder itself whatever the adapter is called.

    Its configuration gives layers and ranks by name, and the scaling that all have by `r` and ``lora_alpha``.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(
            str(folder), selected_adapters=[adapter_name], save_embedding_layers=False, state_dict=state
        )
        inner = folder / adapter_name
        if inner.is_dir():
            for path in inner.iterdir():
                path.replace(folder / path.name)
            inner.rmdir()
    else:
        saveable: Any = model
        saveable.save_pretrained(str(folder), state_dict=state)
    for pattern in _BESIDE_AN_ADAPTER:
        for path in folder.glob(pattern):
            path.unlink()
    path = folder / ADAPTER_CONFIG_FILE
    layers = _layers_by_pattern_name(model, adapter_name)
    modules = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    scaling = _common_scaling(layers, adapter_name)
    config = config_to_store(json.loads(path.read_text(encoding="utf-8")), base_model, modules, ranks, scaling)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


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
    """Refuse an adapter that `save_adapter` cannot save."""
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
