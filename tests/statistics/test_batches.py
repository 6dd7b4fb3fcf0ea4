"""The statistics do not depend on how samples are batched, padded or ordered, whatever the loss is."""

import re

import pytest
import torch
from families.zoo import FAMILIES
from harness import assert_statistics_equal, collate, model_loss, pad_left
from torch import nn
from torch.nn import functional


def pad_far(samples):
    """Pad on the right to a length that no sample has."""
    batch = collate(samples)
    return {name: functional.pad(value, (0, 7), value=-100 if name == "labels" else 0) for name, value in batch.items()}


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("collator", [collate, pad_left, pad_far])
def test_batch_size_and_padding_do_not_matter(
    tiny_llama, token_samples, collected, by_autograd, token_mask, batch_size, collator
):
    model, samples = tiny_llama(), token_samples(8)  # in float64 transformers makes NaN of rows that see nothing
    report, found = collected(model, samples, token_mask=token_mask, batch_size=batch_size, collator=collator)
    assert (report.batch_size, report.notes) == (batch_size, [])
    assert_statistics_equal(found, by_autograd(model, samples, token_mask=token_mask), 1e-5)


@pytest.mark.parametrize(("size", "declared"), [(1, "token_mean"), (3, "token_mean"), (3, "sample_mean")])
def test_samples_without_labels_count_nowhere(tiny_llama, token_samples, collected, by_autograd, size, declared):
    model, samples = tiny_llama(), token_samples(5)
    unlabelled = {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100] * 4}
    with_them = [samples[0], unlabelled, *samples[1:], unlabelled]
    report, found = collected(model, with_them, batch_size=size, loss_reduction=declared)
    assert (report.num_samples, report.num_unlabelled) == (5, 2)
    assert any("one sample at a time" in note for note in report.notes) == (declared == "sample_mean")
    mean_of = "samples" if declared == "sample_mean" else "labels"
    assert_statistics_equal(found, by_autograd(model, samples, mean_of=mean_of), 1e-5)


def per_token_losses(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    losses = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return losses, targets != -100


def token_mean(model, batch, num_items):
    """A custom loss that is the mean over the batch's labels and knows of no number of items."""
    losses, counted = per_token_losses(model, batch)
    return losses.sum() / counted.sum()


def sample_mean(model, batch, num_items):
    losses, counted = per_token_losses(model, batch)
    return (losses.sum(1) / counted.sum(1)).mean()


def honest_sum(model, batch, num_items):
    losses, counted = per_token_losses(model, batch)
    return losses.sum() / (counted.sum() if num_items is None else num_items)


def fused(model, batch, num_items):
    """A loss that goes around the model's output layer, as fused ones do."""
    base = model.get_base_model()
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = functional.linear(hidden, base.lm_head.weight)
    targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    loss = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    return loss / ((targets != -100).sum() if num_items is None else num_items)


def root_of_mean(model, batch, num_items):
    return sample_mean(model, batch, num_items).sqrt()


@pytest.mark.parametrize(
    ("loss", "declared", "batch_size", "kind"),
    [
        (model_loss, "auto", 4, "sum"),
        (honest_sum, "auto", 4, "sum"),
        (fused, "auto", 4, "sum"),
        (token_mean, "auto", 4, "token_mean"),
        (sample_mean, "auto", 4, "sample_mean"),
        (root_of_mean, "auto", 1, "unknown"),
        (token_mean, "token_mean", 4, "token_mean"),
    ],
)
def test_every_kind_of_loss_gives_the_gradients_of_single_samples(
    tiny_llama, token_samples, collected, by_autograd, loss, declared, batch_size, kind
):
    model, samples = tiny_llama(), token_samples(7)
    report, found = collected(model, samples, batch_size=4, loss=loss, loss_reduction=declared)
    assert (report.loss_reduction.split()[0], report.batch_size) == (kind, batch_size)
    assert bool(report.notes) == (kind == "unknown")
    mean_of = "labels" if kind in ("sum", "token_mean") else "samples"
    assert_statistics_equal(found, by_autograd(model, samples, loss=loss, mean_of=mean_of), 1e-5)


class FlatLayers(nn.Module):
    """A model that drops padding before its layers, so that rows cannot be matched to tokens."""

    loss_type = "ForCausalLM"  # its labels shift

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 6)
        self.first = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 96)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels, attention_mask):
        kept = attention_mask.bool()
        hidden = self.embed(input_ids).new_zeros(*input_ids.shape, 6)
        hidden[kept] = self.first(self.embed(input_ids)[kept])
        targets = functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return functional.cross_entropy(self.lm_head(hidden).transpose(1, 2), targets)


@pytest.mark.parametrize("collator", [collate, pad_far])
def test_a_model_that_mixes_samples_is_run_one_at_a_time(token_samples, collected, by_autograd, collator):
    def loss(model, batch, num_items):
        return model(**batch)

    model, samples = FlatLayers(), token_samples(6)
    report, found = collected(model, samples, batch_size=3, loss=loss, collator=collator)
    assert report.batch_size == 1
    (note,) = report.notes
    assert re.search(r"one sample at a time: .*the rows of first", note)
    assert_statistics_equal(found, by_autograd(model, samples, loss=loss), 1e-5)


def pad_to_eight(samples):
    return collate(
        [{n: row + [-100 if n == "labels" else 0] * (8 - len(row)) for n, row in s.items()} for s in samples]
    )


def with_decoder_inputs(samples):
    batch = pad_to_eight(samples)
    shifted = functional.pad(batch["labels"][:, :-1].clamp_min(0), (1, 0))
    return {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": (batch["labels"] != -100).long()}


@pytest.mark.parametrize("collator", [None, pad_to_eight, with_decoder_inputs])
@pytest.mark.parametrize("size", [1, 3])
def test_an_encoder_decoder_whose_two_sides_are_as_long_is_told_apart(collected, collator, size):
    model = FAMILIES["T5"].make_model()
    samples = [
        {"input_ids": list(range(3, 3 + n)), "attention_mask": [1] * n, "labels": list(range(40, 40 + m))}
        for n, m in ((5, 3), (7, 2), (4, 7))  # both sides are padded to 7
    ]
    _, expected = collected(model, samples, collator=None, loss_reduction="token_mean")
    report, found = collected(model, samples, batch_size=size, collator=collator, loss_reduction="token_mean")
    assert (report.batch_size, report.notes) == (size, [])
    assert_statistics_equal(found, expected, 1e-4)
