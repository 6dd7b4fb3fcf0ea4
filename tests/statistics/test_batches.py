"""The statistics do not depend on how samples are batched, padded or ordered, whatever the loss is."""

import re
import weakref

import pytest
import torch
from harness import pad_left
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from lora_da_hf.losses import model_loss
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.taps import Taps


def pad_far(samples):
    """Pad on the right to a length that no sample has."""
    batch = pad_samples(samples)
    return {name: functional.pad(value, (0, 7), value=-100 if name == "labels" else 0) for name, value in batch.items()}


@pytest.fixture
def unlabelled():
    return {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100] * 4}


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("collate", [pad_samples, pad_left, pad_far])
def test_batch_size_and_padding_do_not_matter(
    tiny_llama, token_samples, collected, assert_equal_statistics, token_mask, batch_size, collate
):
    model, samples = tiny_llama(), token_samples(8)  # in float64 transformers makes NaN of rows that see nothing
    single = collected(model, samples, token_mask=token_mask)
    found = collected(model, samples, token_mask=token_mask, batch_size=batch_size, collate=collate)
    assert (found.result.batch_size, found.result.notes) == (batch_size, [])
    assert found.reduction.kind == "sum"
    assert_equal_statistics(found.statistics, single.statistics, tolerance=3e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_without_labels_count_nowhere(
    tiny_llama, token_samples, unlabelled, collected, assert_equal_statistics, batch_size
):
    model, samples = tiny_llama(), token_samples(5)
    expected = collected(model, samples)
    with_them = [samples[0], unlabelled, *samples[1:], unlabelled]
    found = collected(model, with_them, batch_size=batch_size, declared="token_mean")
    assert (found.result.num_samples, found.result.num_unlabelled) == (5, 2)
    assert_equal_statistics(found.statistics, expected.statistics)


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


def label_smoothing(model, batch, num_items):
    """As Trainer's label smoother does it: a mean over the batch's labels, with all of the vocabulary in it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return functional.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=0.1)


def fused(model, batch, num_items):
    """A loss that goes around the model's output layer, as fused ones do."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = functional.linear(hidden, model.lm_head.weight)
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
        (label_smoothing, "auto", 4, "token_mean"),
        (root_of_mean, "auto", 1, "unknown"),
        (token_mean, "token_mean", 4, "token_mean"),
    ],
)
def test_every_kind_of_loss_gives_the_gradients_of_single_samples(
    tiny_llama, token_samples, collected, stacked, assert_equal_statistics, loss, declared, batch_size, kind
):
    model, samples = tiny_llama(), token_samples(7)
    found = collected(model, samples, batch_size=4, compute_loss=loss, declared=declared)
    assert (found.reduction.kind, found.result.batch_size) == (kind, batch_size)
    note = "run one sample at a time: the loss of two samples is neither the sum nor a mean of theirs"
    assert found.result.notes == ([note] if kind == "unknown" else [])
    mean_of = "labels" if kind in ("sum", "token_mean") else "samples"
    assert_equal_statistics(found.statistics, stacked(model, samples, compute_loss=loss, mean_of=mean_of))


def test_a_pass_starts_over_where_a_later_batch_does_not_tell_what_its_loss_is(
    tiny_llama, token_samples, collected, monkeypatch
):
    samples = token_samples(4, min_length=8, max_length=8)
    for sample in samples[:2]:  # a first batch of equally many labels, and a second that has others
        sample["labels"] = [-100] * 3 + sample["input_ids"][3:]
    samples[2]["labels"], samples[3]["labels"] = ([-100] * k + samples[2]["input_ids"][k:] for k in (2, 5))
    made, make = [], Taps.__init__

    def noted(self, *args, **kwargs):
        assert all(taps() is None for taps in made)  # the sums are gone before the next are made
        make(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Taps, "__init__", noted)
    progress = []
    found = collected(tiny_llama(), samples, batch_size=2, declared="even_mean", on_samples=progress.append)
    assert len(made) == 2
    assert progress == [2, -2, 1, 1, 1, 1]
    assert found.result.notes == [
        "run one sample at a time: its labels do not tell what the loss of a batch is a mean over"
    ]


class FlatLayers(nn.Module):
    """A model that drops padding before its layers, so that rows cannot be matched to tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 6)
        self.first = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 96)
        self.loss_type = "ForCausalLM"  # its labels shift

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels, attention_mask, num_items_in_batch=None):
        kept = attention_mask.bool()
        hidden = self.embed(input_ids).new_zeros(*input_ids.shape, 6)
        hidden[kept] = self.first(self.embed(input_ids)[kept])
        logits = self.lm_head(hidden)
        targets = functional.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
        return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def own_loss(model, batch, num_items):
    return model(**batch, num_items_in_batch=num_items)


@pytest.mark.parametrize("collate", [pad_samples, pad_far])
def test_a_model_that_mixes_samples_is_run_one_at_a_time(
    token_samples, collected, stacked, assert_equal_statistics, collate
):
    model, samples = FlatLayers(), token_samples(6)
    found = collected(model, samples, batch_size=3, compute_loss=own_loss, collate=collate)
    assert found.reduction.kind == "sum"
    assert found.result.batch_size == 1
    (note,) = found.result.notes
    assert note.startswith("run one sample at a time: ")
    assert re.search(r"the rows of first, \[\d+\], do not match the token mask \[3, \d+\]", note)
    assert_equal_statistics(found.statistics, stacked(model, samples, compute_loss=own_loss))


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96,
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.3,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).train()


def sequence_pairs(*lengths):
    return [
        {"input_ids": list(range(3, 3 + n)), "attention_mask": [1] * n, "labels": list(range(40, 40 + m))}
        for n, m in lengths
    ]


def pad_to_eight(samples):
    def padded(name, value):
        return torch.tensor([s[name] + [value] * (8 - len(s[name])) for s in samples])

    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100),
    }


def with_decoder_inputs(samples):
    batch = pad_to_eight(samples)
    shifted = torch.nn.functional.pad(batch["labels"][:, :-1].clamp_min(0), (1, 0))
    return {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": (batch["labels"] != -100).long()}


@pytest.mark.parametrize("collate", [None, pad_to_eight, with_decoder_inputs])
@pytest.mark.parametrize("size", [1, 3])
def test_an_encoder_decoder_whose_two_sides_are_as_long_is_told_apart(
    collected, assert_equal_statistics, collate, size
):
    model, samples = tiny_t5(), sequence_pairs((5, 3), (7, 2), (4, 7))  # both sides are padded to 7
    expected = [collected(model, [sample], batch_size=1, declared="token_mean") for sample in samples]
    options = {} if collate is None else {"collate": collate}
    found = collected(model, samples, batch_size=size, declared="token_mean", **options)
    assert found.result.batch_size == size
    assert not found.result.notes
    for name, statistics in found.statistics.items():
        alone = [single.statistics[name] for single in expected]
        assert statistics.num_input_tokens == sum(part.num_input_tokens for part in alone), name
        assert statistics.num_output_tokens == sum(part.num_output_tokens for part in alone), name
    together = collected(model, samples, batch_size=1, declared="token_mean")
    assert_equal_statistics(found.statistics, together.statistics, tolerance=1e-4)
