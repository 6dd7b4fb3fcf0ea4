"""What the loss of a batch is, in terms of its samples, is measured."""

import pytest
import torch

from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.batches import choose_unlike
from lora_da_hf.statistics.loss_reduction import UnlikeSamples, find_reduction


def measured(loss, samples, collate=pad_samples):
    unlike = choose_unlike(samples, collate, shifts_labels=False)
    return find_reduction(UnlikeSamples(unlike, collate, loss, torch.nn.Linear(1, 1), shifts_labels=False)).kind


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


@pytest.mark.parametrize(
    ("loss", "samples", "kind"),
    [
        (toy(1, 3, 4, divides=True), pair(), "sum"),
        (toy(1, 3, 2), pair(), "sample_mean"),
        (toy(1, 3, 2), pair(2, 5), "sample_mean"),
        (toy(1, 3, 2.2), pair(2, 3), "token_mean"),
        (toy(1, 3, 2), pair(3, 3), "even_mean"),
        (toy(2, 2, 2), pair(2, 3), "unknown"),  # too alike to tell
        (toy(0, 0, 0.7), pair(), "batch"),
        (toy(NAN, NAN, 0.7), pair(), "batch"),
        (toy(1, 3, 5), pair(), "unknown"),
        (toy(NAN, NAN, NAN), pair(), "unknown"),
    ],
)
def test_the_reduction_is_measured_on_two_samples(loss, samples, kind):
    assert measured(loss, samples) == kind


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
    assert measured(mean_of_boxes, samples, boxed) == "unknown"
    assert measured(mean_of_boxes, samples[6:], boxed) == "sample_mean"


def test_a_half_precision_model_is_measured_with_more_tolerance():
    off = toy(1, 3, 4.04, divides=True)
    assert measured(off, pair()) == "unknown"
    half = torch.nn.Linear(1, 1).bfloat16()

    def in_half(model, batch, num_items):
        half(torch.ones(1, 1, dtype=torch.bfloat16))  # what a module puts out tells the precision, not its weights
        return off(model, batch, num_items)

    assert measured(in_half, pair()) == "sum"
