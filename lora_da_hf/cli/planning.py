"""What an initialisation of a model that is not loaded has to do: only the model's config is read."""

from __future__ import annotations

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from lora_da_hf.adapters.experts import experts_skipped
from lora_da_hf.adapters.targets import TargetScan, find_targets
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.pipeline.plan import Plan, budget_bytes, groups_of, make_plan, solver_threads, usable_memory
from lora_da_hf.statistics.taps import find_shared_inputs
from lora_da_hf.training.arguments import ModelArguments, with_adapter


def plan_of(
    name: str, loading: ModelArguments, lora: LoraConfig, config: LoRADAConfig, *, num_processes: int
) -> tuple[Plan, TargetScan, int]:
    """Make the plan that `lora-da init` would make on this machine; return the layers and the bytes of weights, too.

    The model is on the meta device, where tensors have no content. A forward pass there shows which layers are fed the
    same tensor.
    """
    trust = {"trust_remote_code": loading.trust_remote_code}
    with torch.device("meta"):
        of_model = AutoConfig.from_pretrained(name, revision=loading.model_revision, **trust)
        dtype = getattr(of_model, "dtype", None) if loading.dtype == "auto" else getattr(torch, loading.dtype)
        model = AutoModelForCausalLM.from_config(of_model, dtype=dtype or torch.float32, **trust)
        model.config.pad_token_id = None  # the pass would look for it in tokens that have no values
        model, ids = with_adapter(model, lora), torch.zeros(1, 8, dtype=torch.long)
    scan = find_targets(model)
    layers = {target.name: target.base_layer for target in scan.targets}
    with torch.no_grad(), adapters_off(scan.targets), experts_skipped(model):
        shared = find_shared_inputs(layers, lambda: model(input_ids=ids))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    if config.memory_budget is None:
        budget = usable_memory(device) / (num_processes if device.type == "cpu" else 1)
    else:
        budget = budget_bytes(config.memory_budget)
    plan = make_plan(
        groups_of(scan.targets, shared),
        num_samples=config.num_samples,
        budget=[budget],
        num_processes=num_processes,
        threads=solver_threads([device]),
        solve_alone=bool(config.save_statistics),
    )
    return plan, scan, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
