"""Which kinds of parallelism a training run may use."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from lora_da_hf.errors import UnsupportedSetupError


def refuse_unsupported_parallelism(args: TrainingArguments) -> None:
    """Refuse runs in which statistics would be of parts, or the initialisation would be undone.

    A process may see neither a part of a sample nor one of a layer's width: data parallelism alone is left.

    Args:
        args: The trainer's.

    Raises:
        UnsupportedSetupError: naming the kind of parallelism; or under DeepSpeed in half precision without ZeRO.
    """
    found = _kinds_of_parallelism(args)
    if found:
        raise UnsupportedSetupError(
            f"LoRA-DA does not work under {found[0]}: no process sees a sample's tokens through a whole layer. "
            "Initialise in a run with data parallelism (DDP, ZeRO or FSDP2) or one process, with "
            "initialize_lora_da(..., output_dir=...), and load that adapter with "
            "PeftModel.from_pretrained(base, output_dir, is_trainable=True)."
        )
    if _hides_float32_copies(args):
        raise UnsupportedSetupError(
            "DeepSpeed without ZeRO (stage 0) keeps float32 copies of a half-precision adapter where they cannot be "
            "written, and its first step would undo the initialisation. Use stage 1, 2 or 3, or DDP."
        )


def _hides_float32_copies(args: TrainingArguments) -> bool:
    plugin: Any = AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None
    config: dict[str, Any] = getattr(plugin, "deepspeed_config", None) or {}
    is_half = args.bf16 or args.fp16 or any(config.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16"))
    return bool(config) and is_half and config.get("zero_optimization", {}).get("stage", 0) == 0


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
