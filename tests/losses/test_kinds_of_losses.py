"""Losses that a model or a user computes: what the statistics are, and that they do not depend on batching."""

import pytest
import torch
from families.zoo import FAMILIES, classification_samples
from harness import (
    EIGHT,
    Adapter,
    assert_initialized,
    assert_statistics_equal,
    autograd_statistics,
    chosen,
    initialize,
    items_of,
    make_config,
    make_trainer,
    model_loss,
    pad_left,
    stored_statistics,
    train_from,
)
from oracles import relative_error
from torch.nn.functional import cross_entropy, normalize, pad

from lora_da_hf.samples import pad_samples


def statistics_of(folder, model, samples, collator=pad_samples, batch_size=4, **settings):
    """Initialise the model, and return the report and the statistics."""
    settings = {**EIGHT, "step_size": 0.1, "collator": collator, "batch_size": batch_size, **settings}
    report = initialize(model, samples, folder, **settings)
    assert_initialized(folder, Adapter.of(model), report)
    return report, stored_statistics(folder)


def loss_row(name, remark, *values):
    return pytest.param(*values, id=name, marks=pytest.mark.support("Losses", name, remark))


MEANS = "its mean is measured: over labels or over samples"
KINDS = [
    loss_row("Causal language model", "a sum over labels divided by `num_items_in_batch`", "Llama", "sum"),
    loss_row("Sequence to sequence", MEANS, "T5", "token_mean"),
    loss_row("Single-label classification", MEANS, "BERT, sequence classification", "sample_mean"),
    loss_row("Token classification", MEANS, "BERT, token classification", "token_mean"),
    loss_row("Regression", MEANS, "BERT, regression", "sample_mean"),
    loss_row("Multi-label classification", MEANS, "BERT, multi-label", "sample_mean"),
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_statistics_do_not_depend_on_batch_size_or_padding(tmp_path, family, kind):
    samples = FAMILIES[family].samples(16)
    single, single_statistics = statistics_of(tmp_path / "1", FAMILIES[family].adapt(), samples, batch_size=1)
    assert single.batch_size == 1
    for name, collate in {"right": pad_samples, "left": pad_left}.items():
        if name == "left" and kind != "sum":
            continue  # positions of these models are absolute, so padding on the left changes their outputs
        report, statistics = statistics_of(tmp_path / name, FAMILIES[family].adapt(), samples, collate)
        assert (report.batch_size, report.loss_reduction.split()[0]) == (4, kind)
        assert_statistics_equal(statistics, single_statistics, 1e-4)


@pytest.mark.parametrize("family", ["Llama", "T5", "BERT, token classification", "BERT, sequence classification"])
def test_the_gradient_is_that_of_the_loss_of_all_samples_in_one_batch(tmp_path, family):
    """That is what Trainer minimises: of samples with unlike numbers of labels, the mean over all of the labels."""
    samples = FAMILIES[family].samples(16)
    _, statistics = statistics_of(tmp_path, FAMILIES[family].adapt(), samples, FAMILIES[family].collate, batch_size=3)
    plain = FAMILIES[family].make_model().eval()
    model_loss(plain, FAMILIES[family].collate(chosen(samples)), None).backward()
    for name, layer in statistics.items():
        gradient = plain.get_submodule(name).weight.grad
        assert relative_error(layer.weight_grad, gradient) < 1e-4, name


@pytest.mark.support("Losses", "Multiple choice", "a mean over samples: measured; each sample is several sequences")
def test_padding_of_sequences_to_choose_from_does_not_count(tmp_path):
    family = FAMILIES["BERT, multiple choice"]
    samples = family.samples(16)
    expected = autograd_statistics(family.adapt(), chosen(samples), model_loss, family.collate)
    for size in (4, 2, 1):
        folder = tmp_path / str(size)
        report, statistics = statistics_of(folder, family.adapt(), samples, family.collate, batch_size=size)
        assert report.batch_size == size
        assert_statistics_equal(statistics, expected, 1e-4)


@pytest.mark.support("Losses", "Label smoothing", "the trainer's own, in `LoRADATrainer` or handed to the callback")
def test_label_smoothing(tmp_path):
    samples = FAMILIES["Llama"].samples(16)
    settings = {"arguments": {"label_smoothing_factor": 0.2}, "da_config": make_config(**EIGHT)}
    trainer = make_trainer(tmp_path, FAMILIES["Llama"].adapt(), samples, **settings)
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)

    def smoothed(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], label_smoothing=0.2)

    expected = autograd_statistics(
        FAMILIES["Llama"].adapt(), chosen(samples), smoothed, pad_samples, items_of(trainer.lora_da_report)
    )
    assert_statistics_equal(stored_statistics(tmp_path / "lora_da"), expected, 1e-4)


def pooled(model, batch):
    """Return a unit vector for each sample."""
    base = model.get_base_model().bert
    hidden = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    kept = batch["attention_mask"][..., None].to(hidden)
    return normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def contrastive(model, batch, num_items=None):
    """Tell the samples apart by their vectors: each is to be most like the batch's sample of its class before it."""
    vectors = pooled(model, batch)
    likeness = vectors @ vectors.mT / 0.5
    return cross_entropy(likeness, torch.roll(torch.arange(len(likeness)), 1))


def only_the_encoder():
    """Return a model whose layers all take part in `pooled`."""
    names = ["query", "key", "value", "dense"]
    family = FAMILIES["BERT, sequence classification"]
    return family.adapt(target_modules=names, exclude_modules=r".*pooler.*")


@pytest.mark.support(
    "Losses",
    "Contrastive, among the samples of a batch (`compute_loss`)",
    "cannot be split: a batch is the unit, the statistics depend on the batch size, and the report says so",
)
def test_a_contrastive_loss_takes_the_batch_as_it_is(tmp_path):
    samples = classification_samples(64)
    model = only_the_encoder()
    settings = {"num_samples": 16, "search_samples": 8}
    report, statistics = statistics_of(tmp_path, model, samples, loss=contrastive, **settings)
    assert report.loss_reduction.startswith("batch (measured: samples have a loss together and none alone")
    assert report.batch_size == 4
    assert "the loss is one of 4 samples together and cannot be split" in " ".join(report.notes)
    taken = chosen(samples, 16, 32)
    groups = [taken[start : start + 4] for start in range(0, 16, 4)]
    expected = autograd_statistics(only_the_encoder(), groups, contrastive, lambda one: pad_samples(one[0]))
    for name, layer in statistics.items():
        torch.testing.assert_close(layer.weight_grad.double(), expected[name].weight_grad, rtol=1e-3, atol=1e-5)


def test_no_sample_is_left_alone_with_a_contrastive_loss(tmp_path):
    sizes = []

    def watched(model, batch, num_items):
        if torch.is_grad_enabled():
            sizes.append(len(batch["input_ids"]))
        return contrastive(model, batch, num_items)

    settings = {"num_samples": 9, "search_samples": 8}
    statistics_of(tmp_path, only_the_encoder(), classification_samples(64), loss=watched, **settings)
    assert sizes == [3, 3, 3]


@pytest.mark.support(
    "Losses", "Triplets inside each sample (`compute_loss`)", "a mean over samples: measured, and run in batches"
)
def test_a_contrastive_loss_inside_each_sample_is_a_mean_over_samples(tmp_path):
    def to_the_mean_token(model, batch, num_items):
        vectors = pooled(model, batch)
        target = normalize(model.get_input_embeddings()(batch["input_ids"][:, 0]), dim=-1)
        return (1 - (vectors * target).sum(-1)).mean()

    settings = {"samples": classification_samples(64), "loss": to_the_mean_token}
    found = [statistics_of(tmp_path / str(size), only_the_encoder(), batch_size=size, **settings) for size in (1, 4)]
    assert [report.batch_size for report, _ in found] == [1, 4]
    assert found[1][0].loss_reduction.startswith("sample_mean")
    assert_statistics_equal(found[1][1], found[0][1], 1e-4)


@pytest.mark.support(
    "Losses", "Any other that a batch's samples cannot be told apart in", "one sample at a time, and the report says so"
)
def test_a_loss_that_is_no_mean_is_run_one_sample_at_a_time(tmp_path):
    samples = FAMILIES["Llama"].samples(16)

    def root(model, batch, num_items=None):
        return model_loss(model, batch).sqrt()

    report, statistics = statistics_of(tmp_path, FAMILIES["Llama"].adapt(), samples, loss=root)
    assert report.batch_size == 1
    assert "run one sample at a time: the loss of two samples is neither" in " ".join(report.notes)
    expected = autograd_statistics(
        FAMILIES["Llama"].adapt(), chosen(samples), lambda m, b: root(m, b, None), pad_samples
    )
    assert_statistics_equal(statistics, expected, 1e-4)


def test_a_term_of_the_whole_batch_that_is_zero_at_the_base_as_in_kto_is_found(tmp_path):
    def desirable(model, batch, num_items=None):
        with torch.no_grad(), model.disable_adapter():
            base = score(model, batch)
        gains = score(model, batch) - base
        return torch.exp(gains.detach().mean() - gains).mean()

    samples = [{"input_ids": sample["input_ids"]} for sample in FAMILIES["Llama"].samples(16)]
    report, _ = statistics_of(tmp_path, FAMILIES["Llama"].adapt(), samples, loss=desirable)
    assert report.batch_size == 1
    assert report.loss_reduction.startswith("unknown")


def score(model, batch):
    """Return a number for each sample."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.logsumexp(-1)
    return (hidden * batch["attention_mask"]).sum(1)


@pytest.mark.parametrize("texts", [["chosen_"], ["", "chosen_"]])
def test_padding_does_not_count_where_a_batch_names_its_masks_otherwise_as_in_orpo(tmp_path, texts):
    def renamed(samples):
        found = [(text, pad_samples(samples[::-1] if text else samples)) for text in texts]
        return {f"{text}{name}": pad(value, (0, 4)) for text, batch in found for name, value in batch.items()}

    def loss(model, batch, num_items=None):
        return sum(score(model, {n: batch[t + n] for n in ("input_ids", "attention_mask")}).mean() for t in texts)

    samples = FAMILIES["Llama"].samples(16)
    report, _ = statistics_of(tmp_path, FAMILIES["Llama"].adapt(), samples, renamed, loss=loss)
    assert report.batch_size == 4
    tokens = sum(len(sample["input_ids"]) for sample in chosen(samples))
    assert {layer.num_tokens for layer in report.layers} == {len(texts) * tokens}


def of_rare_class(model, batch, num_items=None):
    """Weigh one class five times: the mean is over weights."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return cross_entropy(outputs.logits, batch["labels"], weight=torch.tensor([1.0, 5.0, 1.0]))


@pytest.mark.support(
    "Losses",
    "Classes with weights (`compute_loss`)",
    "a batch is the unit, since the mean is over the weights, and a sample alone has the weight 1",
)
@pytest.mark.parametrize("first", [[0, 0, 1, 2], [1, 0, 2, 0], [0, 0, 0, 0]])
def test_weights_of_classes_count_in_whole_batches(tmp_path, first):
    rows = {label: [s for s in classification_samples(200) if s["labels"] == label] for label in range(3)}
    samples = [rows[label].pop() for label in [*first, 0, 0, 0, 1, *[0, 1, 2] * 3]]
    model = FAMILIES["BERT, sequence classification"].adapt()
    report, statistics = statistics_of(tmp_path, model, samples, loss=of_rare_class)
    assert report.loss_reduction.startswith("batch (measured: a mean of unlike weights")
    groups = [chosen(samples)[start : start + 4] for start in (0, 4)]
    model, collate = FAMILIES["BERT, sequence classification"].adapt(), lambda one: pad_samples(one[0])
    expected = autograd_statistics(model, groups, of_rare_class, collate)
    for name, layer in statistics.items():
        torch.testing.assert_close(layer.weight_grad.double(), expected[name].weight_grad, rtol=1e-3, atol=1e-5)
