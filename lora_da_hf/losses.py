"""The losses that models and trainers of transformers compute by themselves, and what is known of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lora_da_hf.errors import DataError
from lora_da_hf.statistics.loss_reduction import ComputeLoss
from lora_da_hf.statistics.model_state import changed, input_embeddings
from lora_da_hf.statistics.token_masks import IGNORED_LABEL, read_batch_tokens

_MORE_POSITIONS = 2
"""Rows that a table of positions has beyond the longest sample, for an offset (OPT, BART)."""

_READS_LOSS_ALONE = "reads_loss_alone"
"""Attribute of a loss that reads nothing but the loss from what the model returns."""
_METRICS = ("_metrics", "_stored_metrics")
"""Where TRL's trainers collect what their losses write down."""
_GATHERS = ("gather", "gather_for_metrics")


def unwrapped(model: Any) -> nn.Module:
    """Return the model inside DDP, `nn.DataParallel`, DeepSpeed's engine or `torch.compile`, or the model itself."""
    wrappers = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}
    model = model.module if wrappers & {kind.__name__ for kind in type(model).__mro__} else model
    return model._modules.get("_orig_mod") or model  # PEFT's models look for other attributes in the base


def base_model_of(model: nn.Module) -> Any:
    """Return the model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_loss(model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
    """Compute the loss that the model returns, divided by ``num_items`` if the model can do that."""
    extra = {} if num_items is None or not accepts_loss_kwargs(model) else {"num_items_in_batch": num_items}
    outputs: Any = model(**batch, **extra)
    if isinstance(outputs, Mapping):
        loss: Any = outputs.get("loss")  # pyright: ignore[reportUnknownMemberType]
    else:
        loss = outputs[0] if isinstance(outputs, tuple | list) else getattr(outputs, "loss", None)  # pyright: ignore
    if not isinstance(loss, Tensor):
        raise DataError(
            f"The model returned no loss from {', '.join(sorted(batch))}. Add labels to the samples, or give "
            "compute_loss (LoRADACallback: callback.attach(trainer) uses the trainer's)."
        )
    return loss


def checked_loss(compute_loss: ComputeLoss) -> ComputeLoss:
    """Give a loss of a user's a batch that it may change, and verify what it returns."""

    @functools.wraps(compute_loss)
    def loss(model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | None) -> Tensor:
        value: Any = compute_loss(model, dict(batch), num_items)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(
                f"compute_loss returned {what}, and compute_loss(model, batch, num_items) must return a scalar tensor. "
                "For a trainer's own loss use LoRADACallback(...).attach(trainer)."
            )
        return value

    return loss


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Tell whether the model's forward hands keyword arguments on to its loss, by transformers' own rule."""
    base = base_model_of(model)
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    kinds = {parameter.kind for parameter in inspect.signature(base.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether position t of the model predicts label t + 1."""
    base = base_model_of(model)
    loss_type = getattr(base, "loss_type", None)
    if loss_type is None:  # a class name that says nothing, as GPT2LMHeadModel: transformers then takes the causal loss
        causal = generates(model)
    else:
        causal = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    return causal and not is_encoder_decoder(model)


def make_labelled_head(model: nn.Module, compute_loss: ComputeLoss) -> LabelledHead | None:
    """Return what runs the head on the rows of labels; None for a model whose head or loss is not known to allow it."""
    base = base_model_of(model)
    reads_loss_alone = compute_loss is model_loss or getattr(compute_loss, _READS_LOSS_ALONE, False)
    if not reads_loss_alone or not isinstance(base, PreTrainedModel):
        return None
    if not shifts_labels(model) or base.loss_function is not ForCausalLMLoss:
        return None
    head = base.get_output_embeddings()
    return LabelledHead(base, head) if isinstance(head, nn.Linear) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a decoder reads the labels as a sequence of its own."""
    return bool(getattr(getattr(base_model_of(model), "config", None), "is_encoder_decoder", False))


def generates(model: nn.Module) -> bool:
    """Tell whether a model of transformers generates text."""
    base = base_model_of(model)
    return isinstance(base, PreTrainedModel) and base.can_generate()


def max_sample_length(model: nn.Module) -> int | None:
    """Return the longest sample, in tokens, that a model's table of positions allows; None without a table.

    Rotary and other computed positions have no end, whatever the config calls the longest one.
    """
    base = base_model_of(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    tokens = input_embeddings(base)
    tables = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and "rel" not in name.rpartition(".")[2]
    ]
    found = [table for table in tables if limit <= table.num_embeddings <= limit + _MORE_POSITIONS]
    # positions are counted from the row behind that of padding, if there is one (RoBERTa)
    return min((limit - (0 if t.padding_idx is None else t.padding_idx + 1) for t in found), default=None)


def input_device(model: nn.Module) -> torch.device:
    """Return the device that batches must be on: where the embeddings are, or the first parameter."""
    weight = getattr(input_embeddings(model), "weight", None)
    return weight.device if isinstance(weight, Tensor) else next(model.parameters()).device


class LabelledHead:
    """Leaves out the logits that the loss ignores, so a masked prompt costs no product with the vocabulary.

    Inside `rows_of_labels` the rows of hidden states that predict a label are given to the head as one sequence
    ``[1, labels, d]``, and their labels to the loss. A pass without labels, or with a selection of its own, is left
    alone. Gradients before the head are the same as ever.

    Attributes:
        num_calls: Passes of the head on rows of labels, since the context was entered.
        seen_loss: What the loss function made of all logits in the pass inside `watched`; None: it was not asked.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._model: Any = model
        self._head = head
        self._labels: Tensor | None = None
        self._rows: Tensor | None = None
        self._shape = torch.Size()
        self.num_calls = 0
        self.seen_loss: float | None = None

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Note in the pass inside whether the model's loss is what the loss function makes of the head's output."""
        loss_function: Callable[..., Tensor] = self._model.loss_function

        def noted(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            loss = loss_function(logits, labels, *args, **kwargs)
            known = labels.shape == logits.shape[:-1] and kwargs.get("shift_labels") is None
            self.seen_loss = loss.double().item() if known else None
            return loss

        with changed([(self._model, "_loss_function", noted)]):
            yield

    @contextlib.contextmanager
    def rows_of_labels(self) -> Generator[None]:
        """Run the passes inside on the rows of labels."""
        self._labels, self.num_calls = None, 0
        loss_function: Callable[..., Tensor] = self._model.loss_function

        def loss_of_rows(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._labels is not None and logits.shape[:2] == self._labels.shape:
                kwargs["shift_labels"] = self._labels
            return loss_function(logits, labels, *args, **kwargs)

        try:
            with (
                changed([(self._model, "_loss_function", loss_of_rows)]),
                self._model.register_forward_pre_hook(self._read_labels, with_kwargs=True),
                self._head.register_forward_pre_hook(self._select),
            ):
                yield
        finally:
            self._labels = self._rows = None

    def _read_labels(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self._labels = self._rows = None
        selects = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep") is not None
        if selects or not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return
        following = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
        rows = (following != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        if rows.numel():
            self._shape, self._rows, self._labels = labels.shape, rows, following.flatten()[rows][None]

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._rows is None or not args or not isinstance(args[0], Tensor) or args[0].shape[:-1] != self._shape:
            self._labels = None  # the logits are those of all rows
            return None
        self.num_calls += 1
        hidden = args[0].flatten(0, 1).index_select(0, self._rows.to(args[0].device))
        return (hidden[None], *args[1:])


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

    setattr(loss, _READS_LOSS_ALONE, is_stock)
    return loss


@contextlib.contextmanager
def as_in_training_alone(trainer: Trainer) -> Generator[None]:
    """Let the loss be that of this process, and one that falls as training goes on; leave no trace in its metrics.

    The routers' auxiliary loss is left out, and so are DPO's weights, which fall with the model's own probabilities.
    `Trainer.compute_loss` multiplies by the number of processes. The losses of TRL write metrics down at each call,
    and gather them from all processes, which call the loss different numbers of times here.
    """
    accelerator: Any = trainer.accelerator
    found = [metrics for name in _METRICS if isinstance(metrics := getattr(trainer, name, None), dict)]
    before = copy.deepcopy(found)
    changes: list[tuple[Any, str, Any]] = [(accelerator, name, lambda one, *_, **__: one) for name in _GATHERS]
    changes += [(trainer.args, "average_tokens_across_devices", False)]
    changes += [(trainer, name, False) for name in ("aux_loss_enabled", "use_weighting")]
    try:
        with changed(changes):
            yield
    finally:
        for metrics, kept in zip(found, before, strict=True):
            metrics.clear()
            metrics.update(kept)
