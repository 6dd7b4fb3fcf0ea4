"""Taps: identity functions on the outputs of linear layers that see input and output gradient in the backward pass."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lora_da_hf.errors import StatisticsError
from lora_da_hf.records import UpperTriangle
from lora_da_hf.statistics.moments import HostSums, add_product_, add_symmetric_product_, full_precision, stays_half
from lora_da_hf.statistics.token_masks import BatchTokens, RoutedTokens, SingleSamplesNeeded, rows_that_count


class _TapFunction(torch.autograd.Function):
    """Identity whose backward hands the layer's input and output gradient to a receiver.

    Gradient checkpointing frees and recomputes the input like any other saved tensor. ``output.data`` is not a view, so
    operations in place are allowed. The anchor makes the graph start here although every parameter is frozen.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, anchor: Tensor, receive: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.receive = receive
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (layer_input,) = ctx.saved_tensors
        ctx.receive(layer_input, grad)
        return grad, None, None, None


@dataclass
class LayerTap:
    """The sums of one tapped layer.

    Attributes:
        input_moment: ``[d_in, d_in]``, sum of ``x x^T`` over the rows that count: the leader's own, for all of a group.
        input_sum: ``[d_in]``, sum of x over the same rows, in the same way.
        squares: ``[d_out]``, sum of ``g**2`` over the rows that count.
        weight_grad: ``[d_out, d_in]``, sum of ``g x^T`` over all rows.
        num_tokens: Rows in ``squares``, and in ``input_moment`` if it is the layer's own.
    """

    name: str
    input_moment: UpperTriangle
    input_sum: Tensor
    squares: Tensor
    weight_grad: Tensor
    leader: LayerTap | None = None
    num_tokens: int = 0
    last_input: weakref.ref[Tensor] | None = None
    forward_calls: int = 0
    backward_calls: int = 0


class Taps:
    """Taps on layers that map ``[..., d_in]`` to ``[..., d_out]``.

    A layer that is given some of the tokens only says which by its attribute ``routed_tokens``.

    Args:
        widths: ``(d_in, d_out)`` of each, since a partitioned weight does not tell.
        shared_inputs: For each layer the name of the layer whose input it shares, as `find_shared_inputs` gives it.
        on_host: Layers on CUDA whose matrices are summed in host memory.
        of_norms: Whether each row is replaced by its norm, so that all widths are 1: sums that cannot cancel.

    Attributes:
        tokens: Those of the batch that runs; None: it counts for nothing.
        gradient_scale: What its loss is multiplied with.
        dtypes: Those of the layers' outputs.
        sequences: Which of the model's sequences the rows of a layer are of; any, if it is not in it.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        widths: Mapping[str, tuple[int, int]],
        shared_inputs: Mapping[str, str],
        devices: Mapping[str, torch.device],
        dtype: torch.dtype = torch.float32,
        on_host: Container[str] = (),
        of_norms: bool = False,
    ) -> None:
        self.tokens: BatchTokens | None = None
        self.gradient_scale = 1.0
        self.dtypes: set[torch.dtype] = set()
        self.sequences: Mapping[str, frozenset[int]] = {}
        self._unmatched: str | None = None
        self._layers = dict(layers)
        self._dtype = dtype
        self._of_norms = of_norms
        self._host = HostSums()
        self.taps: dict[str, LayerTap] = {}
        for name in layers:
            d_in, d_out = widths[name]
            leader = self.taps[shared_inputs[name]] if shared_inputs[name] != name else None
            zeros = functools.partial(torch.zeros, dtype=dtype, device=devices[name])
            home = "cpu" if name in on_host else devices[name]
            moment = leader.input_moment if leader else UpperTriangle.zeros(d_in, dtype=dtype, device=devices[name])
            inputs = replace(moment, entries=moment.entries.to(home)), leader.input_sum if leader else zeros(d_in)
            self.taps[name] = LayerTap(name, *inputs, zeros(d_out), zeros(d_out, d_in, device=home), leader)

    @property
    def groups(self) -> dict[str, list[LayerTap]]:
        """The taps of layers that share an input, by the name of their leader, which is the first of them."""
        shared = {name: (tap.leader or tap).name for name, tap in self.taps.items()}
        return {leader: [self.taps[name] for name in names] for leader, names in input_groups(shared).items()}

    def attached(self) -> AbstractContextManager[None]:
        """Tap the forward passes inside."""
        hooks = ((layer, functools.partial(self._on_forward, self.taps[name])) for name, layer in self._layers.items())
        return hooked(layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in hooks)

    def masks_given_to(self, model: nn.Module) -> AbstractContextManager[None]:
        """Take the masks that the model and its parts are given, for a batch that has none under a known name."""

        def on_model(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if self.tokens is not None and isinstance(mask, Tensor) and mask.dim() == 2:
                self.tokens = replace(self.tokens, masks=(mask.bool(),))

        models = [module for module in model.modules() if hasattr(module, "config")]
        return hooked(module.register_forward_pre_hook(on_model, with_kwargs=True) for module in models)

    def _on_forward(
        self, tap: LayerTap, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        layer_input = first_tensor(args, kwargs)
        tap.forward_calls += self.tokens is not None
        self.dtypes.add(output.dtype)
        tap.last_input = weakref.ref(layer_input)
        if tap.leader is not None:
            expected = tap.leader.last_input
            if expected is None or expected() is not layer_input:
                raise StatisticsError(
                    f"{tap.name} and {tap.leader.name} were fed the same tensor on the first sample and different "
                    "ones now, so they cannot share statistics. Please report this model."
                )
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        receive = functools.partial(self._add, tap, self.tokens, getattr(layer, "routed_tokens", None))
        return _TapFunction.apply(output, layer_input, anchor, receive)

    def check(self) -> None:
        """Raise `SingleSamplesNeeded` if the rows of a layer could not be matched to the tokens of the batch."""
        unmatched, self._unmatched = self._unmatched, None
        if unmatched is not None:
            raise SingleSamplesNeeded(unmatched)

    def _add(
        self, tap: LayerTap, tokens: BatchTokens | None, routed: RoutedTokens | None, x: Tensor, g: Tensor
    ) -> None:
        if tokens is None:
            return
        tap.backward_calls += 1
        sequences = self.sequences.get(tap.name)
        try:
            kept = rows_that_count(tokens, g.shape[:-1], layer=tap.name, sequences=sequences, routed=routed)
        except SingleSamplesNeeded as reason:
            self._unmatched = self._unmatched or str(reason)
            return
        device = tap.squares.device
        with torch.no_grad(), full_precision(device.type):
            x, g = (rows.detach().reshape(-1, rows.shape[-1]).to(device) for rows in (x, g))
            if self._of_norms:
                x, g = (rows.norm(dim=1, keepdim=True, dtype=self._dtype) for rows in (x, g))
            if not (x.dtype == g.dtype and stays_half(x, self._dtype)):
                x, g = x.to(self._dtype), g.to(self._dtype)
            scale = 1.0 / self.gradient_scale
            with self._host.on(device, tap.weight_grad) as total:
                add_product_(total, g, x, scale)
            g = _select(g, kept)
            widened = g.dtype == self._dtype  # rows in half precision are not copied
            squares = (
                g.square().sum(dim=0) if widened else torch.linalg.vector_norm(g, dim=0, dtype=self._dtype).square()
            )
            tap.squares.add_(squares, alpha=scale**2)
            counted: Any = g.shape[0] if kept is None or kept.dtype != torch.bool else kept.sum()
            tap.num_tokens += counted  # a tensor until the pass is over, where only the device knows
            if tap.leader is None:
                x = _select(x, kept)
                tap.input_sum += x.sum(dim=0, dtype=self._dtype)
                with self._host.on(device, tap.input_moment.entries) as entries:
                    add_symmetric_product_(replace(tap.input_moment, entries=entries), x)

    def finish(self) -> None:
        """Wait for what is summed in host memory, and for the numbers of tokens."""
        self._host.finish()
        for tap in self.taps.values():
            tap.num_tokens = int(tap.num_tokens)


def _select(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Take the rows of some indices, or set those to zero that are not in a mask."""
    if kept is None:
        return rows
    kept = kept.to(rows.device)
    return rows.masked_fill(~kept[:, None], 0.0) if kept.dtype == torch.bool else rows.index_select(0, kept)


def find_shared_inputs(layers: Mapping[str, nn.Module], run_forward: Callable[[], Any]) -> dict[str, str]:
    """Run one forward pass and find for each layer its leader: the first layer that was fed the same tensor.

    A layer leads itself if it was not called, or if it or its leader was called twice. Keys are in the order of calls.
    """
    leaders: dict[str, str] = {}
    first_fed: Any = WeakTensorKeyDictionary()
    twice: set[str] = set()

    def see(name: str, layer_input: Tensor) -> None:
        if name in leaders:
            twice.add(name)
        else:
            leaders[name] = first_fed.setdefault(layer_input, name)

    with watched_inputs(layers, see):
        run_forward()
    leaders = {name: name if twice & {name, leader} else leader for name, leader in leaders.items()}
    return leaders | {name: name for name in layers if name not in leaders}


def input_groups(shared_inputs: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the layers that share each input, by the name of their leader."""
    groups: dict[str, list[str]] = {}
    for name, leader in shared_inputs.items():
        groups.setdefault(leader, []).append(name)
    return groups


@contextlib.contextmanager
def watched_rows(layers: Mapping[str, nn.Module]) -> Generator[dict[str, set[int]]]:
    """Note for each layer how many rows it is given in each call inside."""
    rows: dict[str, set[int]] = {}

    def see(name: str, layer_input: Tensor) -> None:
        routed: RoutedTokens | None = getattr(layers[name], "routed_tokens", None)
        given = layer_input.shape[:-1].numel() if routed is None else routed.count
        rows.setdefault(name, set()).add(given)

    with watched_inputs(layers, see):
        yield rows


def watched_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
    """Call ``see`` with the name and the input of each layer that is called inside."""

    def on_forward(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, first_tensor(args, kwargs))

    hooks = ((layer, functools.partial(on_forward, name)) for name, layer in layers.items())
    return hooked(layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in hooks)


@contextlib.contextmanager
def hooked(handles: Iterable[AbstractContextManager[Any]]) -> Generator[None]:
    """Keep hooks, which are registered on entry, for the passes inside."""
    with contextlib.ExitStack() as hooks:
        for handle in handles:
            hooks.enter_context(handle)
        yield


def followed_sequences(
    samples: Sequence[BatchTokens], rows: Sequence[Mapping[str, set[int]]]
) -> dict[str, frozenset[int]]:
    """Return for each layer the sequences that had as many tokens as it had rows, in every one of some single samples.

    A layer of images or audio follows none, so no mask of the text is its own if their numbers coincide in a batch.
    """
    followed: dict[str, frozenset[int]] = {}
    for tokens, given in zip(samples, rows, strict=True):
        if not tokens.masks:
            return {}
        for name, numbers in given.items():
            matching = frozenset(k for k, mask in enumerate(tokens.masks) if mask.numel() in numbers)
            followed[name] = followed.get(name, matching) & matching
    return followed


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor that a layer is called with."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise StatisticsError("A tapped layer was called without a tensor. Exclude it from target_modules.")
