"""Which kinds of parallelism a training run may use."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from lora_da_hf.errors import UnsupportedSetupError


def refuse_split_samples(args: TrainingArguments) -> None:
    """Refuse runs in which a process sees a part of a sample, or of a layer's width: data parallelism alone is left.

    Args:
        args: The trainer's.

    Raises:
        UnsupportedSetupError: naming the kind of parallelism.
    """
    found = _kinds_of_parallelism(args)
    if found:
        raise UnsupportedSetupError(
            f"LoRA-DA does not work under {found[0]}: no process sees a sample's tokens through a whole layer. "
            "Initialise in a run with data parallelism (DDP, ZeRO or FSDP2) or one process, with "
            "initialize_lora_da(..., output_dir=...), and load that adapter with "
            "PeftModel.from_pretrained(base, output_dir, is_trainable=True)."
        )


def _kinds_of_parallelism(args: TrainingArguments) -> list[str]:
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    found: list[str] = []
    if getattr(state, "distributed_type", None) == DistributedType.MEGATRON_LM:
        found.append("Megatron-LM")
    for parallelism in (getattr(args, "parallelism_config", None), getattr(state, "parallelism_config", None)):
        found += [
            kind
            for kind, size in (
                ("tensor parallelism", "tp"),
                ("context parallelism", "cp"),
                ("sequence parallelism", "sp"),
            )
            if (getattr(parallelism, f"{size}_size", None) or 1) > 1
        ]
    plugin = getattr(state, "deepspeed_plugin", None)
    config: dict[str, Any] = getattr(plugin, "deepspeed_config", None) or {}
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        found.append("tensor parallelism")
    if config.get("sequence_parallel_size", 1) > 1:
        found.append("sequence parallelism")
    return found
