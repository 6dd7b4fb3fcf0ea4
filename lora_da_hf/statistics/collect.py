"""The statistics pass: forward and backward over the samples with taps on the layers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lora_da_hf.errors import DataError, NonFiniteError, StatisticsError
from lora_da_hf.statistics.losses import Collate, ComputeLoss, LossReduction
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.taps import SampleWeights, Taps
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, read_batch_tokens

_HALF_PRECISION_SCALE = 2.0**12
_RANDOM_STATE = "random_state"


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What the pass does with each batch.

    Attributes:
        batch_size: Samples in a forward and backward pass.
        token_mask: Which tokens the second moments count.
        shifts_labels: Whether position t predicts label t + 1.
        reduction: What the loss of a batch is.
    """

    batch_size: int
    token_mask: Literal["attention", "labels"]
    shifts_labels: bool
    reduction: LossReduction


@dataclass(kw_only=True)
class PassResult:
    """The sums that a pass leaves, and its counts.

    Attributes:
        taps: The sums of each layer.
        num_samples: Samples that have a label.
        num_unlabelled: Samples that have none, and count nowhere.
        batch_size: Samples run together, which is 1 where the loss or the model demands it.
        notes: Why, if so.
    """

    taps: Taps
    num_samples: int = 0
    num_unlabelled: int = 0
    batch_size: int = 1
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PassState:
    """A pass that is under way, to go on from later to the same bits.

    Attributes:
        tensors: The sums, and the state of torch's random number generator.
        facts: Everything else, as JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class PassStore(Protocol):
    """Where the state of a pass is kept.

    Attributes:
        every: Batches from one state to the next.
    """

    every: int

    def load(self) -> PassState | None:
        """Return the state to go on from, if there is one."""
        ...

    def save(self, state: PassState) -> None:
        """Keep a state in place of the last."""
        ...


def collect(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    make_taps: Callable[[], Taps],
    on_samples: Callable[[int], None],
    store: PassStore | None = None,
) -> PassResult:
    """Run the pass, one sample at a time if the loss or the model cannot be run in batches.

    The result does not depend on the batch size, the padding or the order of the samples: each sample's gradient is
    that of the mean loss over its own labels.

    Args:
        model: In the state of `prepared_for_pass`.
        samples: This process's share.
        collate: Makes batches.
        compute_loss: The loss.
        settings: How.
        make_taps: Makes the taps, with sums at zero.
        on_samples: Called with the number of samples after each batch, and with a negative one when they start over.
        store: Where the state of the pass is kept, and taken up from; None: nowhere.

    Raises:
        NonFiniteError: if a loss is not finite.
        StatisticsError: if even single samples do not fit the settings.
    """
    batch_size, notes = settings.batch_size, []
    if settings.reduction.kind == "unknown" and batch_size > 1:
        batch_size = 1
        notes.append(f"run one sample at a time: {settings.reduction.reason}")
    earlier = store.load() if store is not None else None
    if earlier is not None:
        batch_size, notes = earlier.facts["batch_size"], earlier.facts["notes"]
    while True:
        result = PassResult(taps=make_taps(), batch_size=batch_size, notes=notes)
        batches = _batches(samples, batch_size)
        first = _restore(result, earlier) if earlier is not None else 0
        earlier = None  # its tensors are as large as the sums
        done = sum(map(len, batches[:first]))
        if done:
            on_samples(done)
        try:
            for number, batch_samples in enumerate(batches[first:], start=first + 1):
                _add_batch(model, collate(batch_samples), len(batch_samples), compute_loss, settings, result)
                done += len(batch_samples)
                on_samples(len(batch_samples))
                if store is not None and number % store.every == 0:
                    store.save(_state(result, number))
        except SingleSamplesNeeded as reason:
            if batch_size == 1:
                raise StatisticsError(
                    f"The statistics cannot be taken even one sample at a time: {reason}. If the collator pads single "
                    'samples, turn that off; with token_mask="labels" try "attention".'
                ) from reason
            batch_size, notes = 1, [*notes, f"run one sample at a time: {reason}"]
            on_samples(-done)
            continue
        return result


def _state(result: PassResult, batches_done: int) -> PassState:
    facts = {name: getattr(result, name) for name in ("num_samples", "num_unlabelled", "batch_size", "notes")}
    counts = {"batches_done": batches_done, "counts": result.taps.counts(), "saw_float16": result.taps.saw_float16}
    return PassState(tensors={**result.taps.sums(), _RANDOM_STATE: torch.get_rng_state()}, facts={**facts, **counts})


def _restore(result: PassResult, state: PassState) -> int:
    """Put the sums and counts of an earlier pass in a new one, and return how many batches are in them."""
    result.taps.restore(state.tensors, state.facts["counts"])
    result.taps.saw_float16 = state.facts["saw_float16"]
    result.num_samples, result.num_unlabelled = state.facts["num_samples"], state.facts["num_unlabelled"]
    torch.set_rng_state(state.tensors[_RANDOM_STATE])
    return state.facts["batches_done"]


def _batches(samples: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Batch samples of similar length together: it saves padding, and the order does not matter."""
    ordered = sorted(samples, key=sample_length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def sample_length(sample: Any) -> int:
    """Return the number of tokens of a sample, or 0 if it has no ``input_ids``."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    return len(ids) if ids is not None and hasattr(ids, "__len__") else 0


def _add_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_samples: int,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    result: PassResult,
) -> None:
    tokens = read_batch_tokens(batch, shifts_labels=settings.shifts_labels, token_mask=settings.token_mask)
    if num_samples > 1 and tokens.num_samples != num_samples:
        raise SingleSamplesNeeded(f"the collator makes {tokens.num_samples} rows of {num_samples} samples")
    result.num_samples += tokens.num_labelled
    result.num_unlabelled += tokens.num_samples - tokens.num_labelled
    if tokens.num_labelled == 0:
        return
    weights = settings.reduction.sample_weights(tokens)
    if weights is None:
        raise SingleSamplesNeeded("the labels of each sample cannot be counted")
    taps = result.taps
    taps.tokens = tokens
    with taps, _weighted_head(model, weights if isinstance(weights, Tensor) else None) as head:
        loss = settings.reduction.loss(compute_loss, model, batch)
        check_loss(loss)
        # gradients in float16, whose range is too small for them as they are
        taps.gradient_scale = _HALF_PRECISION_SCALE if taps.saw_float16 else 1.0
        if loss.requires_grad:
            (loss * (taps.gradient_scale if isinstance(weights, Tensor) else weights * taps.gradient_scale)).backward()
        if head is not None:
            head.check()
    taps.tokens = None


@contextlib.contextmanager
def _weighted_head(model: nn.Module, weights: Tensor | None) -> Any:
    if weights is None:
        yield None
        return
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Module):
        raise SingleSamplesNeeded("the model has no output embeddings to weight its samples at")
    with SampleWeights(head) as sample_weights:
        sample_weights.start(weights)
        yield sample_weights


def check_loss(loss: Tensor) -> float:
    """Return the loss as a number.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    value = float(loss.detach().double().item())
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"The loss of a batch is {value}. Check the samples (labels inside the vocabulary, at least one label) "
            "and the model's dtype: float16 overflows where bfloat16 does not."
        )
    return value


def evaluate_loss(
    model: nn.Module,
    samples: Sequence[Any],
    *,
    collate: Collate,
    compute_loss: ComputeLoss,
    settings: PassSettings,
    batch_size: int,
) -> tuple[float, float]:
    """Sum the loss over samples without gradients.

    Returns:
        The summed loss, and the number of labels (or of samples, for a loss that is not a mean over labels) to divide
        it by. Not finite if a loss is not: a step that is too long does that.
    """
    total, count = 0.0, 0.0
    single = settings.reduction.kind == "unknown"
    with torch.no_grad(), without_checkpointing(model):
        for batch_samples in _batches(samples, 1 if single else batch_size):
            batch = collate(batch_samples)
            tokens: BatchTokens = read_batch_tokens(batch, shifts_labels=settings.shifts_labels)
            if tokens.num_labelled == 0:
                continue
            loss = settings.reduction.loss(compute_loss, model, batch)
            part, weight = settings.reduction.loss_sum(loss.double().item(), tokens)
            total, count = total + part, count + weight
    return total, count


def digest_sample(batch: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the tensors of a batch of one sample, by name and content."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            digest.update(f"{name}:{value.dtype}:{list(value.shape)}:".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_lengths(samples: Sequence[Any], limit: int | None) -> None:
    """Verify that no sample is longer than the model allows.

    Raises:
        DataError: naming the longest one.
    """
    longest = max((sample_length(sample) for sample in samples), default=0)
    if limit is not None and longest > limit:
        raise DataError(
            f"A sample has {longest} tokens and the model allows {limit} (max_position_embeddings). Truncate samples "
            f"to {limit} tokens when you tokenise them."
        )
