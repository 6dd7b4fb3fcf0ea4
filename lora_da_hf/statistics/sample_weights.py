"""Weights of samples, where the model's logits are made."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_da_hf.statistics.token_masks import SingleSamplesNeeded

if TYPE_CHECKING:
    from lora_da_hf.statistics.labelled_head import LabelledHead


class _ScaleGradient(torch.autograd.Function):
    """Identity whose backward multiplies the gradient of each sample, or row, by its weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weights: Tensor, seen: Callable[[], None]) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.seen = seen
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weights,) = ctx.saved_tensors
        ctx.seen()
        exact = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad  # weights are no half numbers
        weighted = exact * weights.to(exact).reshape(-1, *[1] * (grad.dim() - 1))
        return weighted.to(grad.dtype), None, None


def scale_gradient(tensor: Tensor, weights: Tensor, seen: Callable[[], None]) -> Tensor:
    """Return the tensor ``[B, ...]``, of which the gradient is multiplied by weights ``[B]`` on its way back.

    Args:
        tensor: Any.
        weights: One for each entry of the first dimension.
        seen: Called in the backward pass.
    """
    return _ScaleGradient.apply(tensor, weights.to(tensor.device), seen)


class SampleWeights:
    """Multiplies the gradient of the loss by a weight per sample, where the model's logits are made.

    Weighting there, and not in each layer, needs nothing from the layout of the layers in between. It is exact for
    every loss that depends on the model only through the output of ``head``.

    Args:
        head: The module that makes the logits, with the samples in the first dimension of its output.
        weights: ``[B]``, of the samples of one batch.
    """

    def __init__(self, head: nn.Module, weights: Tensor) -> None:
        self._head = head
        self._weights = weights
        self._mixed = False
        self._calls = 0
        self._backward_calls = 0
        self._handle: Any = None

    def __enter__(self) -> SampleWeights:
        self._handle = self._head.register_forward_hook(self._on_forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _on_forward(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or output.shape[0] != self._weights.shape[0]:
            self._mixed = True
            return output
        self._calls += 1
        return scale_gradient(output, self._weights, self._seen)

    def _seen(self) -> None:
        self._backward_calls += 1

    def check(self) -> None:
        """Verify that the weights went into the gradient of the batch exactly once.

        Raises:
            SingleSamplesNeeded: if the loss went around the head, or the head mixes the samples.
        """
        if self._mixed:
            raise SingleSamplesNeeded("the model's head does not keep the samples apart in its first dimension")
        if self._calls != 1 or self._backward_calls != 1:
            raise SingleSamplesNeeded("the loss does not go through the model's output layer exactly once")


@contextlib.contextmanager
def weighted_head(
    model: nn.Module, labelled_head: LabelledHead | None, weights: Tensor | None, head: nn.Module | None = None
) -> Generator[LabelledHead | SampleWeights | None]:
    """Weight the samples of the pass inside at the model's head.

    Args:
        model: The model.
        labelled_head: Runs the head on the rows that predict a label; None: it runs on all.
        weights: What the gradient of each sample is multiplied by, ``[B]``; None: nothing.
        head: The module that makes the logits, as `watched_logits` finds it; None: the output embeddings, or the last
            part of the model.

    Yields:
        What has a ``check``, for after the backward pass; None if there is nothing to check.

    Raises:
        SingleSamplesNeeded: if the model has no head.
    """
    if labelled_head is not None:
        with labelled_head.rows_of_labels(weights):
            yield labelled_head
        return
    if weights is None:
        yield None
        return
    head = head or _output_layer(model)
    if head is None:
        raise SingleSamplesNeeded("the model has no output layer to weight its samples at")
    with SampleWeights(head, weights) as sample_weights:
        yield sample_weights


@contextlib.contextmanager
def watched_logits(model: nn.Module) -> Generator[list[nn.Module]]:
    """Watch which module puts out what the model inside returns as its ``logits``.

    Yields:
        A list that has it once the model ran, if one does; the last if one is inside another.
    """
    found: list[nn.Module] = []
    outputs: list[tuple[weakref.ref[Tensor], nn.Module]] = []

    def on_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((weakref.ref(output), module))
            return
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if isinstance(logits, Tensor) and module is _base_of(model):
            found[:] = [made_by for made, made_by in outputs if made() is logits][-1:]
            outputs.clear()

    with nn.modules.module.register_module_forward_hook(on_forward):
        yield found


def _base_of(model: nn.Module) -> Any:
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def _output_layer(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings, or the last part of a model with another head."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module):
        return head
    return next(reversed(list(_base_of(model).children())), None)
