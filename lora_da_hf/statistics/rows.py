"""Which rows of a layer count: whose tokens they are is told by their number, and by what a few samples showed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.errors import StatisticsError
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Which of a batch's ``count`` tokens a layer is given: the place ``[rows]`` of each row's token among them."""

    indices: Tensor
    count: int


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor that a layer is called with."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise StatisticsError("A tapped layer was called without a tensor. Exclude it from target_modules.")


def rows_that_count(
    tokens: BatchTokens,
    leading_shape: torch.Size,
    *,
    layer: str,
    sequences: frozenset[int] | None = None,
    routed: RoutedTokens | None = None,
) -> Tensor | None:
    """Return the indices ``[kept]`` of the rows of a layer that count; None if all do.

    Rows that match no sequence of tokens are those of the other modality if there is one, or one a sample, and count
    if the sample has a label. ``sequences`` are those that the rows may be of (`followed_sequences`), and ``routed``
    the tokens that the layer is given, if not all.
    """
    kept = _rows(tokens, leading_shape if routed is None else torch.Size([routed.count]), layer, sequences)
    if kept is None or routed is None:
        return kept
    counts = torch.zeros(routed.count, dtype=torch.bool, device=routed.indices.device)
    counts[kept.to(counts.device)] = True
    return counts[routed.indices].nonzero().squeeze(1)


def _rows(tokens: BatchTokens, shape: torch.Size, layer: str, sequences: frozenset[int] | None) -> Tensor | None:
    is_flat = len(shape) == 1 or tokens.num_samples == 1
    numbers = range(len(tokens.masks)) if sequences is None else sequences
    matching = [k for k in numbers if _without_ones(tokens.masks[k].shape) == _without_ones(shape)]
    if not matching and is_flat:
        matching = [k for k in numbers if tokens.masks[k].numel() == shape.numel()]
    if matching:
        first, *others = (tokens.kept[k] for k in matching)
        if not all(_same(first, other) for other in others):
            raise SingleSamplesNeeded(
                f"the rows of {layer}, {list(shape)}, could be those of either of the model's sequences"
            )
        return first
    if not is_flat and shape[0] % tokens.num_samples:
        raise SingleSamplesNeeded(f"some rows are not those of one sample after another ({list(shape)} in {layer})")
    if tokens.masks_other_modality and tokens.num_samples > 1 and tokens.kept[0] is not None:
        raise SingleSamplesNeeded(
            f"the attention mask is of another sequence than the layers' rows ({list(tokens.masks[0].shape)}, and "
            f"{list(shape)} in {layer})"
        )
    all_labelled = tokens.num_labelled == tokens.num_samples
    if all(kept is None for kept in tokens.kept) or (tokens.other_modality and all_labelled):
        return None
    if tokens.num_samples in (1, shape.numel()):  # one row a sample, as heads that classify have it
        return None if all_labelled or tokens.label_counts is None else tokens.label_counts.nonzero().squeeze(1)
    for mask in tokens.masks:
        if shape.numel() == len(mask):  # one row a sequence, of which a sample has several
            return mask.any(dim=1).nonzero().squeeze(1)
    shapes = ", ".join(str(list(mask.shape)) for mask in tokens.masks)
    raise SingleSamplesNeeded(f"the rows of {layer}, {list(shape)}, do not match the token mask {shapes}")


def _without_ones(shape: torch.Size) -> list[int]:
    """Return the shape without dimensions of 1 after the first, as heads that are shared have them."""
    return [*shape[:1], *(size for size in shape[1:] if size != 1)]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


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


@contextlib.contextmanager
def watched_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Generator[None]:
    """Call ``see`` with the name and the input of each layer that is called inside."""

    def on_forward(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, first_tensor(args, kwargs))

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hook = functools.partial(on_forward, name)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def followed_sequences(
    samples: Sequence[BatchTokens], rows: Sequence[Mapping[str, set[int]]]
) -> dict[str, frozenset[int]]:
    """Return for each layer the sequences that had as many tokens as it had rows, in every one of some single samples.

    A layer of images or audio follows none, so no mask of the text is its own if their numbers coincide in a batch.
    """
    followed: dict[str, frozenset[int]] = {}
    for tokens, given in zip(samples, rows, strict=True):
        for name, numbers in given.items():
            matching = frozenset(k for k, mask in enumerate(tokens.masks) if mask.numel() in numbers)
            followed[name] = followed.get(name, matching) & matching
    return followed
