"""Parameters that DeepSpeed or FSDP2 keep in parts or in copies: their true shape, reading and writing them as a whole.

Each operation on a parameter that is kept in parts is a collective: every process must call it, for the same parameters
in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_da_hf.distributed.processes import Processes
from lora_da_hf.errors import UnsupportedSetupError


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_whole(parameter: Tensor) -> bool:
    """Tell whether a parameter is the process's own: in one piece, and without a copy that an optimizer works on."""
    return not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") or isinstance(parameter, DTensor))


@contextlib.contextmanager
def gathered(parameter: Tensor) -> Generator[Tensor]:
    """Give the whole parameter inside the context, to be read and not kept."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def read_full(parameter: Tensor) -> Tensor:
    """Return a copy of the whole parameter."""
    with gathered(parameter) as whole:
        return whole.detach().clone()


def write_full(parameter: Tensor, value: Tensor) -> bool:
    """Overwrite a parameter and its optimizer's copy; tell whether both read back the same on every process."""
    requires_grad = parameter.requires_grad
    parameter.requires_grad_(True)  # DeepSpeed does not hand out its copy of a frozen parameter
    try:
        with torch.no_grad():
            _overwrite(parameter, value)
        master = _read_master(parameter)
    finally:
        parameter.requires_grad_(requires_grad)
    copies = [read_full(parameter), *([] if master is None else [master])]
    same = all(torch.equal(copy.to(value.device, value.dtype), value) for copy in copies)
    return same if is_whole(parameter) else all(Processes.current().gather(same))


def _overwrite(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero
        from deepspeed.utils import safe_set_local_fp32_param

        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        if _in_zero3_optimizer(parameter):
            # safe_set_full_fp32_param fails if the processes do not divide the number of elements
            size = parameter.ds_tensor.numel()
            start = size * torch.distributed.get_rank(parameter.ds_process_group)
            part = torch.zeros(size, dtype=torch.float32, device=value.device)
            mine = value.reshape(-1)[start : start + size]
            part[: mine.numel()] = mine
            safe_set_local_fp32_param(parameter, part)
    elif isinstance(parameter, DTensor):
        sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(sharded.to_local())
    else:
        parameter.copy_(value)
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)


def _read_master(parameter: Tensor) -> Tensor | None:
    """Return the float32 copy that DeepSpeed's optimizer works on; None: there is none."""
    if not (hasattr(parameter, "_hp_mapping") or _in_zero3_optimizer(parameter)):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def _in_zero3_optimizer(parameter: Tensor) -> bool:
    optimizer: Any = getattr(parameter, "_z3_optimizer", None)
    return optimizer is not None and optimizer.get_param_id(parameter) in optimizer.grad_position


def is_partitioned(model: nn.Module) -> bool:
    """Tell whether processes have parts of the parameters, so that each pass, or look at one, is a collective."""
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())  # gathered or not
    return by_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def settle(model: nn.Module) -> None:
    """Have FSDP2 forget the gathered weights, and what was trainable, once parameters were written or frozen."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


@contextlib.contextmanager
def outputs_not_rounded(model: nn.Module) -> Generator[None]:
    """Have FSDP2 hand on what the model returns, the loss among it, and not a copy in half precision."""
    returned: list[Any] = []
    with contextlib.ExitStack() as hooks:
        for root in [module for module in model.modules() if isinstance(module, FSDPModule)][:1]:
            wrapped: Any = root
            keep = wrapped.register_forward_hook(lambda _, args, output: returned.append(output), prepend=True)
            hooks.enter_context(keep)
            hooks.enter_context(wrapped.register_forward_hook(lambda *_: returned.pop()))
        yield


def refuse_split_models(model: nn.Module) -> None:
    """Refuse models of which a process does not compute whole layers, or whose parameters lost their shape or name."""
    modules = list(model.modules())
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    kinds = {kind for module in modules for kind in type(module).__mro__}
    by_tensor = any((getattr(module, "_tp_size", None) or 1) > 1 for module in modules)
    by_tensor |= FSDPModule not in kinds and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    reasons = {
        "LoRA-DA does not work with FSDP1, which joins the parameters of a layer and leaves no adapter to write. Use "
        "FSDP2: fsdp_version: 2 in accelerate's config.": FullyShardedDataParallel in kinds,
        "FSDP's own activation checkpointing renames the layers, so PEFT stores no weight of an adapter. Turn it off "
        "in fsdp_config and use gradient_checkpointing=True.": "_checkpoint_wrapped_module" in parts,
        "torch.compile wrapped modules inside the model, which renames the layers. Compile them in place, with "
        "module.compile(), or after the initialisation.": "_orig_mod" in parts,
        NOT_SPLIT.format("pipeline parallelism"): "PipelineModule" in {kind.__name__ for kind in kinds},
        NOT_SPLIT.format("tensor parallelism"): by_tensor,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedSetupError(reason)


NOT_SPLIT = (
    "LoRA-DA does not work under {}: no process sees a layer's whole input and output. Initialise in a run with data "
    "parallelism (DDP, ZeRO or FSDP2) or one process, with initialize_lora_da(..., output_dir=...), and load that "
    "adapter with PeftModel.from_pretrained(base, output_dir, is_trainable=True)."
)
