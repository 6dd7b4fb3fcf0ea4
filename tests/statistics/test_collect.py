"""The pass beyond its sums: what a loss is, evaluation, digests, and errors that say what to do."""

import contextlib

import pytest
import torch

from lora_da_hf.errors import DataError
from lora_da_hf.losses import model_loss
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.batches import Lockstep, check_lengths
from lora_da_hf.statistics.collect import PassSettings, evaluate_loss
from lora_da_hf.statistics.loss_reduction import LossReduction, find_reduction
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded
from lora_da_hf.statistics.unlike import choose_unlike

UNLABELLED = {"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [-100] * 3}


def evaluate(model, samples, compute_loss, kind, batch_size):
    settings = PassSettings(
        batch_size=4,
        token_mask="attention",
        shifts_labels=True,
        encoder_decoder=False,
        reduction=LossReduction(kind=kind, reason=""),
    )
    options = {"collate": pad_samples, "compute_loss": compute_loss, "settings": settings}
    return evaluate_loss(model, samples, batch_size=batch_size, **options)


def losses_of(model, samples):
    with torch.no_grad():
        return [model_loss(model, pad_samples([sample]), None).item() for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind", ["sum", "token_mean"])
def test_the_evaluated_loss_is_summed_over_labels_at_any_batch_size(tiny_llama, token_samples, kind, batch_size):
    model, samples = tiny_llama().eval(), token_samples(7)
    seen = []

    def watching(model, batch, num_items):
        loss = model_loss(model, batch, num_items)
        seen.append(loss.requires_grad)
        return loss

    counts = [sum(label != -100 for label in sample["labels"][1:]) for sample in samples]
    expected = sum(count * loss for count, loss in zip(counts, losses_of(model, samples), strict=True))
    total, count = evaluate(model, [*samples, UNLABELLED], watching, kind, batch_size)
    assert (total, count) == (pytest.approx(expected, rel=1e-5), sum(counts))
    assert not any(seen)


@pytest.mark.parametrize("kind", ["unknown", "sample_mean"])
def test_a_loss_of_another_kind_is_averaged_over_samples(tiny_llama, token_samples, kind):
    model, samples = tiny_llama().eval(), token_samples(7)
    sizes = []

    def mean_of_samples(model, batch, num_items):
        rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(batch["labels"]))]
        sizes.append(len(rows))
        return sum(model_loss(model, row, None) for row in rows) / len(rows)

    total, count = evaluate(model, samples, mean_of_samples, kind, 4)
    assert (total, count) == (pytest.approx(sum(losses_of(model, samples)), rel=1e-5), 7)
    assert max(sizes) == (1 if kind == "unknown" else 4)


def test_batches_that_only_keep_the_processes_in_step_do_not_count(tiny_llama, token_samples, collected):
    samples = [*token_samples(3), UNLABELLED]
    options = {"declared": "token_mean", "batch_size": 2}
    expected = collected(tiny_llama(), samples, **options)
    sizes, seen = [], []

    def loss(model, batch, num_items):
        sizes.append(len(batch["labels"]))
        return model_loss(model, batch, num_items)

    lockstep = Lockstep(most=lambda number: max(number, 5), filler=samples[0], alike=contextlib.nullcontext)
    found = collected(tiny_llama(), samples, lockstep=lockstep, compute_loss=loss, on_samples=seen.append, **options)
    assert sizes[-5:] == [2, 2, 1, 1, 1]
    assert seen == [2, 2]
    assert (found.result.num_samples, found.result.num_unlabelled) == (3, 1)
    for name, layer in expected.statistics.items():
        assert torch.equal(found.statistics[name].weight_grad, layer.weight_grad)
        assert torch.equal(found.statistics[name].input_second_moment, layer.input_second_moment)
        assert found.statistics[name].num_output_tokens == layer.num_output_tokens
    for name, tap in found.result.taps.taps.items():
        assert tap.backward_calls == expected.result.taps.taps[name].backward_calls


def test_a_sample_that_is_too_long_is_an_error_that_gives_both_lengths(token_samples):
    samples = token_samples(3, min_length=9, max_length=9)
    check_lengths(samples, pad_samples, 9)
    check_lengths(samples, pad_samples, None)
    check_lengths([], pad_samples, 9)
    with pytest.raises(
        DataError, match=r"A sample has 9 tokens and the model allows 8 .* Truncate samples to 8 tokens"
    ):
        check_lengths(samples, pad_samples, 8)


def measured(loss, model, collate, samples, **options):
    unlike = choose_unlike(samples, collate, shifts_labels=False)
    return find_reduction(loss, model, collate, unlike, shifts_labels=False, **options)


def reduction_of(loss, samples, model=None, **options):
    model = model or torch.nn.Linear(1, 1)
    return measured(loss, model, pad_samples, samples, **options)


def toy(first, second, both, *, divides=False):
    """Return a loss with these values on the first of a pair of samples, the second, and both."""
    values = {(1.0,): first, (2.0,): second, (1.0, 2.0): both}

    def loss(model, batch, num_items):
        value = torch.tensor(float(values[tuple(batch["x"].tolist())]))
        return value / num_items if divides and num_items is not None else value

    return loss


def pair(*label_counts):
    """Return two samples with so many labels each, of a classification of one label if there are none given."""
    labels = [[1] * count for count in label_counts] or [1, 1]
    return [{"x": x, "labels": label} for x, label in zip((1.0, 2.0), labels, strict=True)]


NAN = float("nan")
TOO_ALIKE = (
    "a mean, and the losses are too alike in this precision to tell whether of labels or of samples: loss_reduction "
    "can say it"
)
A_MEAN = "measured: the mean of its samples' losses"


@pytest.mark.parametrize(
    ("loss", "samples", "kind", "reason"),
    [
        (toy(1, 3, 4, divides=True), pair(), "sum", "measured: a sum over labels divided by num_items_in_batch"),
        (toy(1, 3, 2), pair(), "sample_mean", A_MEAN),
        (toy(1, 3, 2), pair(2, 5), "sample_mean", A_MEAN),
        (toy(1, 3, 2.2), pair(2, 3), "token_mean", "measured: the mean over the batch's labels"),
        (toy(1, 3, 2), pair(3, 3), "even_mean", "measured: the mean of samples with equally many labels"),
        (toy(2, 2, 2), pair(2, 3), "unknown", TOO_ALIKE),
        (toy(0, 0, 0.7), pair(), "batch", "measured: samples have a loss together and none alone"),
        (toy(NAN, NAN, 0.7), pair(), "batch", "measured: samples have a loss together and none alone"),
        (toy(1, 3, 5), pair(), "unknown", "the loss of two samples is neither the sum nor a mean of theirs"),
        (toy(NAN, NAN, NAN), pair(), "unknown", "the loss of two samples is neither the sum nor a mean of theirs"),
    ],
)
def test_the_reduction_is_measured_on_two_samples(loss, samples, kind, reason):
    found = reduction_of(loss, samples)
    assert (found.kind, found.reason) == (kind, reason)


def per_sample(batch, weights=(1.0, 5.0, 1.0)):
    """Return a loss of each sample by its class, and a weight."""
    return 1.0 + batch["x"].double(), torch.tensor(weights)[batch["labels"]].double()


def weighted_mean(model, batch, num_items):
    losses, weights = per_sample(batch)
    return (losses * weights).sum() / weights.sum()


def weighted_mean_scaled_to_a_sum(model, batch, num_items):
    return weighted_mean(model, batch, None) * (1 if num_items is None else len(batch["x"]) / num_items)


def weighted_sum(model, batch, num_items):
    losses, weights = per_sample(batch)
    return (losses * weights).sum() / (weights.sum() if num_items is None else num_items)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(weighted_mean, "unknown"), (weighted_mean_scaled_to_a_sum, "unknown"), (weighted_sum, "sum")],
)
@pytest.mark.parametrize("rare", [1, 30])
def test_weights_of_classes_show_though_most_samples_are_of_one_class(loss, kind, rare):
    samples = [{"x": float(number), "labels": int(number == rare)} for number in range(40)]
    assert reduction_of(loss, samples).kind == kind


def boxed(samples):
    return {
        "pixel_values": torch.tensor([[sample["x"]] for sample in samples]),
        "labels": [{"class_labels": torch.zeros(sample["boxes"])} for sample in samples],
    }


def mean_of_boxes(model, batch, num_items):
    counts = torch.tensor([len(target["class_labels"]) for target in batch["labels"]])
    return (batch["pixel_values"][:, 0] * counts).sum() / counts.sum()


def test_targets_in_lists_of_dictionaries_are_seen():
    samples = [{"x": float(number), "boxes": 1 + (number == 5)} for number in range(12)]
    model = torch.nn.Linear(1, 1)
    assert measured(mean_of_boxes, model, boxed, samples).kind == "unknown"
    assert measured(mean_of_boxes, model, boxed, samples[6:]).kind == "sample_mean"


def test_a_half_precision_model_is_measured_with_more_tolerance():
    off = toy(1, 3, 4.04, divides=True)
    assert reduction_of(off, pair()).kind == "unknown"
    half = torch.nn.Linear(1, 1).bfloat16()

    def in_half(model, batch, num_items):
        half(torch.ones(1, 1, dtype=torch.bfloat16))  # what a module puts out tells the precision, not its weights
        return off(model, batch, num_items)

    assert reduction_of(in_half, pair()).kind == "sum"


@pytest.mark.parametrize(
    ("kind", "counts", "num_items", "weight"),
    [
        ("sum", [2, 4], 6, 1.0),
        ("token_mean", [2, 4], 6, 6.0),
        ("sample_mean", [2, 4], 2, 2.0),
        ("batch", [2, 4], 2, 2.0),
        ("even_mean", [3, 3], 2, 2.0),
        ("unknown", [5], 1, 1.0),
        ("sample_mean", [0, 4], None, None),
        ("even_mean", [2, 4], None, None),
        ("unknown", [2, 4], None, None),
    ],
)
def test_a_batch_is_weighted_by_what_its_loss_is_a_mean_over(kind, counts, num_items, weight):
    reduction = LossReduction(kind=kind, reason="")
    mask = torch.ones(len(counts), 3, dtype=torch.bool)
    tokens = BatchTokens(
        num_samples=len(counts), label_counts=torch.tensor(counts), masks=(mask,), num_labels=sum(counts)
    )
    if num_items is None:
        with pytest.raises(SingleSamplesNeeded):
            reduction.num_items(tokens)
    else:
        assert reduction.num_items(tokens) == num_items
        assert reduction.weight(num_items) == weight
