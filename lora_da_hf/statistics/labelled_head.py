"""A causal model's head and loss, run on the positions that predict a label alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.statistics.model_state import changed
from lora_da_hf.statistics.token_masks import IGNORED_LABEL


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
