"""Forward passes that run layers differently: without adapters, with a step on trial, moved, or checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_da_hf.adapters.experts import experts_apart
from lora_da_hf.adapters.targets import Target
from lora_da_hf.errors import TargetError
from lora_da_hf.statistics.model_state import changed
from lora_da_hf.statistics.taps import first_tensor, hooked

_MOVE = 0.1


@contextlib.contextmanager
def adapters_off(targets: Sequence[Target]) -> Generator[None]:
    """Skip the adapters of the layers in forward passes: they are no-ops until they are written, and cost time.

    None is active meanwhile, and none disabled: a loss that disables them to ask the base model still can. Layers with
    several adapters are left as they are: a loss that switches to another one and back turns ours on again, so a
    checkpointed forward would differ from its recomputation. Experts are run one by one.
    """
    layers = [target.layer for target in targets if len(target.layer.lora_A) == 1]
    # set_adapter() would touch requires_grad too
    off = changed([(layer, "_active_adapter", []) for layer in layers])
    with off, experts_apart(target.base_layer for target in targets):
        yield


@dataclass
class Trial:
    """The step being tried, and the rank; None: each layer's own."""

    step_size: float = 0.0
    rank: int | None = None


@contextlib.contextmanager
def trial_adapters(targets: Sequence[Target], bases: Mapping[str, tuple[Tensor, Tensor]]) -> Generator[Trial]:
    """Add ``step_size * basis_B[:, :rank] basis_A[:rank] x`` to the outputs of the base layers, inside the context.

    The adapter itself must be a no-op meanwhile (B zero), as it is before it is written. No parameter is touched,
    however it is partitioned. Passes without this adapter, as reference models make them, are left alone.

    Args:
        bases: ``basis_A [R, d_in]`` and ``basis_B [d_out, R]`` of each, with R at least its rank.
    """
    trial = Trial()

    def add_offset(target: Target) -> Any:
        basis_A, basis_B = (basis.to(target.device, target.lora_A.dtype) for basis in bases[target.name])

        def on_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if trial.step_size == 0.0 or _asks_another_model(target):
                return output
            rank = min(trial.rank or target.rank, basis_A.shape[0])
            layer_input = first_tensor(args, kwargs).to(basis_A.dtype)
            offset = linear(linear(layer_input, basis_A[:rank]), basis_B[:, :rank])
            return (output + offset * trial.step_size).to(output.dtype)

        return on_forward

    with hooked(t.base_layer.register_forward_hook(add_offset(t), with_kwargs=True) for t in targets):
        yield trial


def outputs_moved(targets: Sequence[Target]) -> AbstractContextManager[None]:
    """Move each output of the layers by a tenth, up or down at random, where an adapter would change it.

    What a loss makes of that tells it from others that are the same at the base. It depends neither on the scale of a
    layer nor, beyond rounding, on device and precision.
    """
    generator = torch.Generator().manual_seed(0)

    def move(target: Target) -> Any:
        signs = torch.randint(0, 2, (target.out_features,), generator=generator) * 2 - 1
        factors = (1 + _MOVE * signs).to(target.device)

        def on_forward(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            return output if _asks_another_model(target) else (output * factors).to(output.dtype)

        return on_forward

    return hooked(t.base_layer.register_forward_hook(move(t), with_kwargs=True) for t in targets)


def _asks_another_model(target: Target) -> bool:
    """Tell whether the pass is one without this adapter: of the base, or of another adapter."""
    return target.layer.disable_adapters or any(name != target.adapter_name for name in target.layer.active_adapters)


def checked_backward(targets: Sequence[Target]) -> AbstractContextManager[None]:
    """Verify in the forward passes inside that layers of foreign kinds map a tensor to a tensor and have a backward.

    Kernels for inference have no backward, so every layer before them would get no gradient. Each such layer is run
    once more on its input, with gradients; plain linear layers are left alone.
    """
    checks: Any = ((target.base_layer, functools.partial(_check_backward, target)) for target in targets)
    return hooked(
        layer.register_forward_pre_hook(check, with_kwargs=True)
        for layer, check in checks
        if type(layer) not in (nn.Linear, Conv1D) or type(layer.weight) is not nn.Parameter
    )


def _check_backward(target: Target, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    what = f"{target.name}: its base layer, a {type(layer).__module__}.{type(layer).__name__},"
    advice = "Load the model in another quantisation or with a kernel for training, or exclude it from target_modules."
    with torch.enable_grad():
        leaf = first_tensor(args, kwargs).detach().requires_grad_(True)
        try:
            output = layer.forward(leaf)
            if not isinstance(output, Tensor):
                raise TargetError(
                    f"{what} returns a {type(output).__name__}, to which PEFT cannot add an adapter's output. Exclude "
                    "it from target_modules."
                )
            torch.autograd.grad(output.sum(), leaf)
        except (RuntimeError, NotImplementedError) as error:
            raise TargetError(f"{what} cannot be differentiated ({error}). {advice}") from error
