"""Which kinds of parallelism a training run may use."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from lora_da_hf.distributed.parameters import NOT_SPLIT
from lora_da_hf.errors import UnsupportedSetupError


def refuse_unsupported_parallelism(args: TrainingArguments) -> None:
    """Refuse all but data parallelism, and DeepSpeed in half precision without ZeRO."""
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    deepspeed: dict[str, Any] = getattr(getattr(state, "deepspeed_plugin", None), "deepspeed_config", None) or {}
    if getattr(state, "distributed_type", None) == DistributedType.MEGATRON_LM:
        raise UnsupportedSetupError(NOT_SPLIT.format("Megatron-LM"))
    configs = [getattr(owner, "parallelism_config", None) for owner in (args, state)]
    for kind, name, of_deepspeed in (
        ("tensor", "tp_size", deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)),
        ("context", "cp_size", 1),
        ("sequence", "sp_size", deepspeed.get("sequence_parallel_size", 1)),
    ):
        if max(of_deepspeed, *(getattr(config, name, None) or 1 for config in configs)) > 1:
            raise UnsupportedSetupError(NOT_SPLIT.format(f"{kind} parallelism"))
    is_half = args.bf16 or args.fp16 or any(deepspeed.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16"))
    if deepspeed and is_half and deepspeed.get("zero_optimization", {}).get("stage", 0) == 0:
        raise UnsupportedSetupError(
            "DeepSpeed without ZeRO (stage 0) keeps float32 copies of a half-precision adapter where they cannot be "
            "written, and its first step would undo the initialisation. Use stage 1, 2 or 3, or DDP."
        )
