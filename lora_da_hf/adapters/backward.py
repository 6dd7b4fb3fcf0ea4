"""Layers whose weights are not plain tensors: whether a gradient comes through them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf.adapters.targets import Target
from lora_da_hf.errors import TargetError


@contextlib.contextmanager
def checked_backward(targets: Sequence[Target]) -> Generator[None]:
    """Verify in the forward passes inside that layers of foreign kinds map a tensor to a tensor and have a backward.

    Kernels for inference have no backward, so every layer before them would get no gradient. Each such layer is run
    once more on its input, with gradients; plain linear layers are left alone.
    """
    with contextlib.ExitStack() as hooks:
        for target in targets:
            layer: Any = target.base_layer
            if type(layer) not in (nn.Linear, Conv1D) or type(layer.weight) is not nn.Parameter:
                hooks.enter_context(layer.register_forward_pre_hook(_check(target), with_kwargs=True))
        yield


def _check(target: Target) -> Any:
    def on_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_input = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if layer_input is None:
            raise _unsupported(target, "is called without a tensor", _EXCLUDE)
        with torch.enable_grad():
            leaf = layer_input.detach().requires_grad_(True)
            try:
                output = layer.forward(leaf)
                if not isinstance(output, Tensor):
                    what = f"returns a {type(output).__name__}, to which PEFT cannot add an adapter's output"
                    raise _unsupported(target, what, _EXCLUDE)
                if output.shape != (shape := (*leaf.shape[:-1], target.out_features)):
                    raise _unsupported(target, f"returns {list(output.shape)} in place of {list(shape)}", _EXCLUDE)
                gradient: Any = torch.autograd.grad(output.sum(), leaf, allow_unused=True)[0]
            except (RuntimeError, NotImplementedError) as error:
                raise _unsupported(target, f"cannot be differentiated ({error})", _OTHER_KERNEL) from error
        if gradient is None:
            raise _unsupported(target, "lets no gradient through", _OTHER_KERNEL)

    return on_forward


_EXCLUDE = "Exclude it from target_modules."
_OTHER_KERNEL = (
    "Load the model in another quantisation or with a kernel for training, or exclude it from target_modules."
)


def _unsupported(target: Target, what: str, advice: str) -> TargetError:
    kind = type(target.base_layer)
    return TargetError(f"{target.name}: its base layer, a {kind.__module__}.{kind.__name__}, {what}. {advice}")
