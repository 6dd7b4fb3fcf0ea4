"""Which of the sequences that a model reads the rows of a layer are those of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_da_hf.statistics.token_masks import BatchTokens, RoutedTokens, first_tensor


@contextlib.contextmanager
def watched_rows(layers: Mapping[str, nn.Module]) -> Generator[dict[str, set[int]]]:
    """Note for each layer how many rows it is given in each call inside."""
    rows: dict[str, set[int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def on_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routed: RoutedTokens | None = getattr(layer, "routed_tokens", None)
            shape = first_tensor(args, kwargs).shape[:-1] if routed is None else torch.Size([routed.count])
            rows.setdefault(name, set()).add(shape.numel())

        return on_forward

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
        yield rows


def followed_sequences(
    samples: Sequence[BatchTokens], rows: Sequence[Mapping[str, set[int]]]
) -> dict[str, frozenset[int]]:
    """Return for each layer the sequences that had as many tokens as it had rows, in every one of some single samples.

    A layer of images or audio follows none, so no mask of the text is its own if their numbers coincide in a batch.

    Args:
        samples: The tokens of each sample, by itself.
        rows: The rows that each layer was given for it.
    """
    followed: dict[str, frozenset[int]] = {}
    for tokens, given in zip(samples, rows, strict=True):
        for name, numbers in given.items():
            matching = frozenset(k for k, mask in enumerate(tokens.masks) if mask.numel() in numbers)
            followed[name] = followed.get(name, matching) & matching
    return followed
