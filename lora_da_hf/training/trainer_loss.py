"""The loss of a trainer, as the statistics pass calls it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import DataError, UnsupportedSetupError
from lora_da_hf.losses import TAKES_LOSS_ALONE, shifts_labels
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.token_masks import read_batch_tokens

TrainerLoss = Callable[..., Any]
"""A loss as `Trainer.compute_loss` takes and returns it."""

_METRICS = ("_metrics", "_stored_metrics")
"""Where TRL's trainers collect what their losses write down."""


def adapt_loss(compute_loss: TrainerLoss) -> ComputeLoss:
    """Make a loss of `Trainer.compute_loss`'s kind one that the statistics pass can call.

    A loss that takes no ``num_items_in_batch`` is called without it. One that a user gave to a trainer is never called
    with None where the trainer would count the items, since the trainer never does that.
    """
    parameters = inspect.signature(compute_loss).parameters.values()
    takes_items = any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters)
    trainer: Any = getattr(compute_loss, "__self__", None)
    counts_items = takes_items and isinstance(trainer, Trainer) and _gives_items_to_a_loss_of_its_own(trainer)

    def loss(model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        if num_items is None and counts_items and isinstance(batch.get("labels"), Tensor):
            counts = read_batch_tokens(batch, shifts_labels=shifts_labels(model)).label_counts
            num_items = torch.tensor(batch["labels"].shape[0]) if counts is None else counts.sum()
        extra = {"num_items_in_batch": num_items} if takes_items else {}
        result = compute_loss(model, dict(batch), **extra)
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, torch.Tensor) or result.numel() != 1:
            found = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise DataError(f"The trainer's compute_loss returned {found}, and it must return a scalar tensor.")
        return result

    setattr(loss, TAKES_LOSS_ALONE, _is_stock(trainer))
    return loss


def _gives_items_to_a_loss_of_its_own(trainer: Trainer) -> bool:
    """Tell whether a trainer has a loss of a user's, and gives it the number of items wherever there are labels."""
    if trainer.compute_loss_func is not None:
        return True
    return not _is_stock(trainer) and bool(getattr(trainer, "model_accepts_loss_kwargs", False))


def _is_stock(trainer: Any) -> bool:
    """Tell whether a trainer's ``compute_loss`` is transformers' own, in no way replaced."""
    return (
        isinstance(trainer, Trainer)
        and type(trainer).compute_loss is Trainer.compute_loss
        and "compute_loss" not in vars(trainer)
        and Trainer.compute_loss.__module__ == Trainer.__module__
    )


@contextmanager
def metrics_kept(compute_loss: TrainerLoss | None) -> Generator[None]:
    """Put back the metrics that the losses of TRL's trainers write down at each call: this is no evaluation.

    Raises:
        UnsupportedSetupError: in several processes, from all of which those losses gather their metrics at each call.
    """
    trainer = getattr(compute_loss, "__self__", None)
    metrics: list[dict[Any, Any]] = [
        found for name in _METRICS if isinstance(found := getattr(trainer, name, None), dict)
    ]
    if metrics and Ranks.current().size > 1:
        raise UnsupportedSetupError(
            f"The loss of a {type(trainer).__name__} gathers metrics from all "
            "processes at each call, and they call it different numbers of times here, so they would wait for each "
            "other for ever. Leave the callback's compute_loss unset if the model's own loss will do (SFT), or "
            "initialise in one process."
        )
    before = copy.deepcopy(metrics)
    try:
        yield
    finally:
        for found, kept in zip(metrics, before, strict=True):
            found.clear()
            found.update(kept)


@contextmanager
def no_averaging_over_devices(args: TrainingArguments) -> Generator[None]:
    """Keep `Trainer.compute_loss` from multiplying the loss by the number of processes."""
    before = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before
