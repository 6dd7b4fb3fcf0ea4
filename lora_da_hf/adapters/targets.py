"""The LoRA layers of a model, as PEFT injected them, and which of them can be initialised."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lora_da_hf.adapters.experts import ExpertLinear, slice_factors, why_not_apart
from lora_da_hf.distributed.parameters import full_shape, is_whole, read_full
from lora_da_hf.errors import AdapterAlreadyTrainedError, TargetError, UnsupportedSetupError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One LoRA layer that will be initialised.

    Attributes:
        name: The base layer's name in the base model, such as ``model.layers.0.self_attn.q_proj``.
        peft_scaling: What PEFT multiplies ``B A`` with.
        lora_A: ``[r, d_in]``.
        lora_B: ``[d_out, r]``.
        magnitude: DoRA's magnitude of the layer; None without DoRA.
    """

    name: str
    layer: LoraLayer
    base_layer: nn.Module
    rank: int
    peft_scaling: float
    in_features: int
    out_features: int
    lora_A: Tensor
    lora_B: Tensor
    adapter_name: str
    magnitude: DoraLinearLayer | None = None

    @property
    def device(self) -> torch.device:
        """Where the adapter, and with it the layer's statistics, live."""
        return self.lora_A.device

    @property
    def is_routed(self) -> bool:
        """Whether it is an expert, which not every token goes through."""
        return isinstance(self.base_layer, ExpertLinear)


@dataclass(frozen=True, kw_only=True)
class TargetScan:
    """Layers that can be initialised, in the model's order, and those that keep PEFT's start, with the reason."""

    targets: list[Target]
    kept: dict[str, str]
    adapter_name: str


def active_adapter_name(model: nn.Module) -> str:
    """Return the name of the model's one active adapter; none or several are a TargetError."""
    configs = getattr(model, "peft_config", {}).values()
    others = sorted({type(config).__name__ for config in configs if config.peft_type != PeftType.LORA})
    if others:
        raise TargetError(f"The adapter was made with {', '.join(others)}. Make it with a LoraConfig.")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise TargetError(
            "The model has no LoRA layer. Wrap it with peft.get_peft_model(model, LoraConfig(...)), or give "
            "LoRADATrainer a peft_config, and check its target_modules."
        )
    names = {name for layer in layers for name in layer.active_adapters}
    if len(names) != 1:
        raise TargetError(f"Active adapters are {sorted(names)}. Activate exactly one with set_adapter.")
    return names.pop()


def find_targets(model: nn.Module) -> TargetScan:
    """Find the LoRA layers of the active adapter that can be initialised.

    Raises:
        TargetError: if there is no LoRA layer, or none that can be initialised.
        UnsupportedSetupError: for experts under ZeRO and FSDP2.
    """
    adapter_name = active_adapter_name(model)
    peft_config = getattr(model, "peft_config", {}).get(adapter_name)
    tied: Collection[str] = getattr(peft_config, "target_modules_to_tie", None) or ()
    bases = {layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)}
    names = ((module, name) for name, module in model.named_modules(remove_duplicate=False) if module in bases)
    # base layers that have another name too, under which PEFT put no adapter: it wraps the first
    elsewhere = {module: base_name(name) for module, name in names if not name.endswith("base_layer")}
    mixer = ("out_proj", "conv1d", "dt_bias", "D")  # of a Mamba-2, whose out_proj PEFT refuses, but not in hybrids
    fused = {module.out_proj for module in model.modules() if all(hasattr(module, name) for name in mixer)}
    targets: list[Target] = []
    kept: dict[str, str] = {}
    for full_name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        name = base_name(full_name)
        reason = _why_kept(name, layer, adapter_name, tied, elsewhere)
        reason = "Mamba-2's kernel reads its weight in training, without the adapter" if layer in fused else reason
        if reason:
            kept[name] = reason
            continue
        for target in _expert_targets(name, layer, adapter_name) or [_target(name, layer, adapter_name)]:
            if target.rank > target.in_features:
                kept[target.name] = f"rank {target.rank} is above its input size {target.in_features}"
            else:
                targets.append(target)
    if not targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise TargetError(
            f"None of the {len(kept)} LoRA layers can be initialised. {reasons}. Target linear layers, "
            "at a rank of at most their input size."
        )
    return TargetScan(targets=targets, kept=kept, adapter_name=adapter_name)


def base_name(full_name: str) -> str:
    """Return the name that a layer has in the base model, without what PEFT puts before it."""
    return full_name.removeprefix("base_model.model.")


def _why_kept(name: str, layer: LoraLayer, adapter_name: str, tied: Collection[str], elsewhere: Any) -> str | None:
    base = layer.get_base_layer()
    variant: Any = layer.lora_variant.get(adapter_name)
    if isinstance(layer, ParamWrapper) and (reason := why_not_apart(layer)):
        return reason
    if variant is not None and not _is_dora(layer, adapter_name):
        return f"its LoRA variant {type(variant).__name__} is not initialised from data"
    lora_A = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
    if not isinstance(lora_A, nn.Linear) or isinstance(base, nn.MultiheadAttention):
        return f"{type(base).__name__} is not a linear layer"
    if name in tied:
        return "its adapter is the one of the embeddings (ensure_weight_tying)"
    return f"its base layer also runs as {elsewhere[base]}, without the adapter" if base in elsewhere else None


def _is_dora(layer: LoraLayer, adapter_name: str) -> bool:
    return type(layer.lora_variant.get(adapter_name)) is DoraLinearVariant


def _target(name: str, layer: LoraLayer, adapter_name: str) -> Target:
    factors: Any = layer
    return Target(
        name=name,
        layer=layer,
        base_layer=layer.get_base_layer(),
        rank=layer.r[adapter_name],
        peft_scaling=layer.scaling[adapter_name],
        in_features=factors.in_features,
        out_features=factors.out_features,
        lora_A=factors.lora_A[adapter_name].weight,
        lora_B=factors.lora_B[adapter_name].weight,
        adapter_name=adapter_name,
        magnitude=factors.lora_magnitude_vector[adapter_name] if _is_dora(layer, adapter_name) else None,
    )


def _expert_targets(name: str, layer: LoraLayer, adapter_name: str) -> list[Target]:
    """Return a target for each expert of a layer of ``target_parameters``, named ``<layer>[<expert>]``."""
    if not isinstance(layer, ParamWrapper):
        return []
    whole = _target(name, layer, adapter_name)
    if not (is_whole(whole.lora_A) and is_whole(whole.lora_B)):
        raise UnsupportedSetupError(
            f"{name}: DeepSpeed or FSDP keeps the experts' shared adapter in parts or in copies, which cannot be "
            "written by expert. Use DDP, or initialise in one process with an output_dir and load that adapter."
        )
    targets: list[Target] = []
    for index in range(layer.num_experts):
        lora_A, lora_B = slice_factors(whole.lora_A.data, whole.lora_B.data, rank=whole.rank, index=index)
        base_layer = ExpertLinear(whole.base_layer, layer.parameter_name, index)
        named = f"{name}[{index}]"
        targets.append(dataclasses.replace(whole, name=named, base_layer=base_layer, lora_A=lora_A, lora_B=lora_B))
    return targets


def check_ready(targets: Sequence[Target]) -> None:
    """Verify that layers are in a state to be initialised in. Under ZeRO-3 and FSDP2 it is a collective.

    Raises:
        TargetError: if a layer has no values, or its adapter is off.
        UnsupportedSetupError: for DoRA under ZeRO-3, and on Apple's GPUs.
        AdapterAlreadyTrainedError: if a B is not zero.
    """
    for target in targets:
        base: Any = target.base_layer
        weight = getattr(base, "weight", None)
        if any(part is not None and part.is_meta for part in (weight, target.lora_A, target.lora_B)):
            raise TargetError(
                f"{target.name}: it is on the meta device, so it has no values. Load the model without offloading, and "
                "make the adapter without low_cpu_mem_usage=True."
            )
        if target.device.type == "mps":
            raise UnsupportedSetupError(
                "Apple's GPUs (MPS) have no float64, which layers are solved in. Initialise on the CPU with an "
                "output_dir, and load that adapter with PeftModel.from_pretrained(base, output_dir, is_trainable=True)."
            )
        if target.magnitude is not None and full_shape(base.weight) != base.weight.shape:
            raise UnsupportedSetupError(
                f"{target.name}: a DoRA adapter cannot be initialised under ZeRO-3. Use DDP, ZeRO-1 or 2, FSDP2, or "
                "LoRA."
            )
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) is True:
            raise TargetError(
                f"{target.name}: its 4-bit weight was packed for inference on the CPU, which lets no gradient through. "
                "Load the model again, and initialise before any evaluation."
            )
        if target.layer.disable_adapters or target.layer.merged:
            raise TargetError(
                f"{target.name}: its adapter is disabled, or merged into the base weight. Call "
                "enable_adapter_layers() or unmerge_adapter() first."
            )
    used = [target.name for target in targets if bool(read_full(target.lora_B).any())]
    if used:
        raise AdapterAlreadyTrainedError(
            f"lora_B is not zero in {len(used)} layers ({used[0]} first): the adapter was trained already, or was "
            "not made with init_lora_weights=True. Initialise a fresh adapter; to go on training this one, leave "
            "LoRA-DA out or resume from a checkpoint."
        )


def keep_weights_unpacked(model: nn.Module) -> None:
    """Put bitsandbytes' 4-bit layers in train mode, which changes nothing else of them.

    In evaluation mode they rewrite their weights in place on some CPUs, to a layout that lets no gradient through.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.training = True
