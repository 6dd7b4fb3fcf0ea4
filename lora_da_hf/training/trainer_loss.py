"""The loss of a trainer, as the statistics pass calls it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lora_da_hf.losses import TAKES_LOSS_ALONE, shifts_labels
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.token_masks import read_batch_tokens

_METRICS = ("_metrics", "_stored_metrics")
"""Where TRL's trainers collect what their losses write down."""


def loss_of(trainer: Trainer) -> ComputeLoss:
    """Make a trainer's loss one that the pass can call, with the number of items where the trainer counts them."""
    parameters = inspect.signature(trainer.compute_loss).parameters.values()
    takes_items = any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters)
    is_stock = (
        type(trainer).compute_loss is Trainer.compute_loss
        and "compute_loss" not in vars(trainer)
        and Trainer.compute_loss.__module__ == Trainer.__module__
    )
    counts = trainer.compute_loss_func is not None or (not is_stock and bool(trainer.model_accepts_loss_kwargs))

    def loss(model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        if num_items is None and takes_items and counts and isinstance(batch.get("labels"), Tensor):
            labels = read_batch_tokens(batch, shifts_labels=shifts_labels(model)).label_counts
            num_items = torch.tensor(batch["labels"].shape[0]) if labels is None else labels.sum()
        extra: dict[str, Any] = {"num_items_in_batch": num_items} if takes_items else {}
        with trainer.compute_loss_context_manager():
            result: Any = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)), **extra)
        return result[0] if isinstance(result, tuple) else result

    setattr(loss, TAKES_LOSS_ALONE, is_stock)
    return loss


@contextmanager
def as_in_training_alone(trainer: Trainer) -> Generator[None]:
    """Let the loss be that of this process, and leave no trace in the trainer's metrics.

    `Trainer.compute_loss` multiplies by the number of processes. The losses of TRL write metrics down at each call,
    and gather them from all processes, which call the loss different numbers of times here.
    """
    accelerator: Any = trainer.accelerator
    found = [metrics for name in _METRICS if isinstance(metrics := getattr(trainer, name, None), dict)]
    before = copy.deepcopy(found)
    averages = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    accelerator.gather = accelerator.gather_for_metrics = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
        trainer.args.average_tokens_across_devices = averages
        for metrics, kept in zip(found, before, strict=True):
            metrics.clear()
            metrics.update(kept)
