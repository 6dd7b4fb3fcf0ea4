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


class _Plain:
    """A parameter that every process has as a whole, and nobody has a copy of."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    @contextlib.contextmanager
    def gathered(self) -> Generator[Tensor]:
        yield self.parameter

    def write(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value)

    def read_master(self) -> Tensor | None:
        """Return the optimizer's copy; None: it keeps no copy."""
        return None


class _Zero12(_Plain):
    """ZeRO-1 and 2: whole, with a float32 copy of which each process has a part."""

    def write(self, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().write(value)
        safe_set_full_fp32_param(self.parameter, value)

    def read_master(self) -> Tensor | None:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(self.parameter)


class _Zero3(_Plain):
    """ZeRO-3: each process has a part of the parameter and of its float32 copy, padded to equal sizes."""

    @contextlib.contextmanager
    def gathered(self) -> Generator[Tensor]:
        from deepspeed import zero

        with zero.GatheredParameters([self.parameter]):
            yield self.parameter

    def write(self, value: Tensor) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_local_fp32_param

        with zero.GatheredParameters([self.parameter], modifier_rank=0), torch.no_grad():
            self.parameter.copy_(value)
        if self._is_optimized:
            # safe_set_full_fp32_param fails if the processes do not divide the number of elements
            size = self.parameter.ds_tensor.numel()
            start = size * torch.distributed.get_rank(self.parameter.ds_process_group)
            part = torch.zeros(size, dtype=torch.float32, device=value.device)
            mine = value.reshape(-1)[start : start + size]
            part[: mine.numel()] = mine
            with _requiring_grad(self.parameter):
                safe_set_local_fp32_param(self.parameter, part)

    def read_master(self) -> Tensor | None:
        from deepspeed.utils import safe_get_full_fp32_param

        if not self._is_optimized:
            return None
        with _requiring_grad(self.parameter):
            return safe_get_full_fp32_param(self.parameter)

    @property
    def _is_optimized(self) -> bool:
        optimizer = getattr(self.parameter, "_z3_optimizer", None)
        return optimizer is not None and optimizer.get_param_id(self.parameter) in optimizer.grad_position


class _Sharded(_Plain):
    """FSDP2: each process has a part, which its optimizer works on."""

    @contextlib.contextmanager
    def gathered(self) -> Generator[Tensor]:
        yield self.parameter.full_tensor()

    def write(self, value: Tensor) -> None:
        sharded = distribute_tensor(value, self.parameter.device_mesh, self.parameter.placements)
        with torch.no_grad():
            self.parameter.to_local().copy_(sharded.to_local())


@contextlib.contextmanager
def _requiring_grad(parameter: nn.Parameter) -> Generator[None]:
    """Let DeepSpeed reach the float32 copy, which it does not for a frozen parameter."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def _kind_of(parameter: Tensor) -> _Plain:
    if hasattr(parameter, "ds_id"):
        return _Zero3(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _Zero12(parameter)
    return _Sharded(parameter) if isinstance(parameter, DTensor) else _Plain(parameter)


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameter: Tensor) -> contextlib.AbstractContextManager[Tensor]:
    """Give the whole parameter inside the context, to be read and not kept."""
    return _kind_of(parameter).gathered()


def read_full(parameter: Tensor) -> Tensor:
    """Return a copy of the whole parameter."""
    with gathered(parameter) as whole:
        return whole.detach().clone()


def write_full(parameter: Tensor, value: Tensor) -> bool:
    """Overwrite a parameter and its optimizer's copy; tell whether both read back the same on every process."""
    kind = _kind_of(parameter)
    kind.write(value)
    master = kind.read_master()
    copies = [read_full(parameter), *([] if master is None else [master])]
    same = all(torch.equal(copy.to(value.device, value.dtype), value) for copy in copies)
    return same if type(kind) is _Plain else all(Processes.current().gather(same))


def is_whole(parameter: Tensor) -> bool:
    """Tell whether a parameter is the process's own: in one piece, and without a copy that an optimizer works on."""
    return type(_kind_of(parameter)) is _Plain


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
