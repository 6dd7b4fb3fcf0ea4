"""What an initialisation of a model that is not loaded has to do: its config is read, and the data if there is any."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lora_da_hf.adapters.experts import experts_skipped
from lora_da_hf.adapters.targets import TargetScan, find_targets
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.pipeline.job import DEFAULT_SEED
from lora_da_hf.pipeline.plan import USABLE, Plan, budget_bytes, groups_of, make_plan, solver_threads, usable_memory
from lora_da_hf.samples import choose_samples
from lora_da_hf.statistics.taps import find_shared_inputs
from lora_da_hf.training.arguments import ModelArguments, TextArguments, with_adapter
from lora_da_hf.training.text import choose_block_size, tokenize

_PROBED = 13
"""Samples that the probe of a causal language model runs forward."""
_SEARCHES = 11
"""Times that the search samples are run: without a step, with 8, and some at other ranks."""


def plan_of(
    name: str,
    rows: Any,
    text: TextArguments,
    loading: ModelArguments,
    lora: LoraConfig,
    config: LoRADAConfig,
    *,
    num_processes: int,
) -> tuple[Plan, TargetScan, dict[str, int]]:
    """Make the plan that `lora-da init` would make on this machine; return the layers and some numbers, too.

    The model is on the meta device, where tensors have no content. A forward pass there shows which layers are fed the
    same tensor. If ``rows`` are None, samples are as many as asked for, and as long as they may be.
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
    splits = choose_samples(_samples(name, model, rows, text, loading, config), config, seed=DEFAULT_SEED)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    budget = usable_memory(device) / (num_processes if device.type == "cpu" else 1) - USABLE * weights
    groups = [dataclasses.replace(g, device_type=device.type) for g in groups_of(scan.targets, shared)]
    plan = make_plan(
        groups,
        num_samples=len(splits.statistics),
        budget=[max(budget, 0.0) if config.memory_budget is None else budget_bytes(config.memory_budget)],
        host=usable_memory(torch.device("cpu")),
        num_processes=num_processes,
        threads=solver_threads([device]),
        solve_alone=bool(config.save_statistics),
    )
    statistics, search, unseen = (
        [len(sample["input_ids"]) for sample in part] for part in (splits.statistics, splits.search, splits.unseen)
    )
    forward = _PROBED * sum(statistics) // len(statistics) + _SEARCHES * sum(search) + 2 * sum(unseen)
    numbers = {
        "samples_forward": _PROBED + _SEARCHES * len(search) + 2 * len(unseen),
        "tokens": sum(statistics) * len(plan.windows) + forward,
        "longest_sample": max(statistics),
        "weight_bytes": weights,
        "statistics_bytes": sum(group.sum_bytes for group in groups),
    }
    return plan, scan, numbers


def _samples(
    name: str, model: Any, rows: Any, text: TextArguments, loading: ModelArguments, config: LoRADAConfig
) -> Any:
    """Tokenise the rows, or make up more samples than are chosen."""
    if rows is None:
        length = choose_block_size(text.block_size, model, PreTrainedTokenizerBase())
        return [{"input_ids": range(length)}] * (config.num_samples + 10 * config.search_samples + 2)
    revision = {} if loading.tokenizer_name else {"revision": loading.model_revision}
    options = {**revision, "trust_remote_code": loading.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(loading.tokenizer_name or name, **options)
    return tokenize("training", rows, tokenizer, choose_block_size(text.block_size, model, tokenizer), text)
