"""Labels drawn from the model: the statistics against autograd, the distribution, and what cannot be drawn."""

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.errors import StatisticsError
from lora_da_hf.losses import model_loss
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.sampled_labels import SampledLabels, check_labels_can_be_sampled

SEED = 3


def tiny_classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
            initializer_range=0.5,
        )
        return BertForSequenceClassification(config).eval()


def classes(samples, labels):
    return [{**sample, "labels": label} for sample, label in zip(samples, labels, strict=True)]


def with_drawn_labels(model, samples, seed=SEED):
    """Draw the labels of each sample alone."""
    sampled = SampledLabels(samples, seed=seed, shifts_labels=True)
    found = []
    for sample in samples:
        batch = pad_samples([sample])
        drawn = sampled.draw(batch, [sample], sampled.logits(model, batch))
        found.append({**sample, "labels": drawn["labels"][0].tolist()})
    return found


@pytest.mark.parametrize("labelled_head", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_gradients_have_the_datas_labels_and_squares_the_drawn_ones(
    tiny_llama, token_samples, collected, stacked, assert_equal_statistics, batch_size, labelled_head
):
    model, samples = tiny_llama(), token_samples(9)
    drawn = with_drawn_labels(model.eval(), samples)
    found = collected(model, samples, batch_size=batch_size, sampling_seed=SEED, labelled_head=labelled_head)
    own, other = stacked(model, samples), stacked(model, drawn)
    expected = {
        name: dataclasses.replace(own[name], output_grad_second_moment_diag=other[name].output_grad_second_moment_diag)
        for name in own
    }
    assert_equal_statistics(found.statistics, expected)


def test_drawn_labels_stand_where_labels_count_and_change_with_the_seed(tiny_llama, token_samples):
    model, samples = tiny_llama().eval(), token_samples(9)
    first, again, other = (with_drawn_labels(model, samples, seed) for seed in (0, 0, 1))
    assert first == again
    for sample, a in zip(samples, first, strict=True):
        counts = [label != -100 for label in sample["labels"][1:]]
        assert counts == [label != -100 for label in a["labels"][1:]]
        assert all(0 <= label < 96 for label, counted in zip(a["labels"][1:], counts, strict=True) if counted)
        assert a["labels"] != sample["labels"]
        assert a["input_ids"] == sample["input_ids"]
    assert sum(a["labels"] != b["labels"] for a, b in zip(first, other, strict=True)) >= 8


def test_a_sample_keeps_its_labels_in_another_batch_and_in_a_share_of_the_samples(tiny_llama, token_samples):
    model, samples = tiny_llama().eval(), token_samples(7)
    sampled = SampledLabels(samples, seed=SEED, shifts_labels=True)
    alone = with_drawn_labels(model, samples)
    for share in (samples[1::2], samples[::-1]):
        batch = pad_samples(share)
        drawn = sampled.draw(batch, share, sampled.logits(model, batch))["labels"]
        for sample, row in zip(share, drawn, strict=True):
            expected = alone[samples.index(sample)]["labels"]
            assert row[: len(expected)].tolist() == expected


def test_classes_are_drawn_as_often_as_their_probabilities_say():
    samples = [{"labels": 0} for _ in range(4000)]
    logits = torch.tensor([[0.0, 1.0, -30.0, 2.0]]).expand(4000, 4)
    drawn = SampledLabels(samples, seed=0, shifts_labels=False).draw(
        {"labels": torch.zeros(4000).long()}, samples, logits
    )
    counts = torch.bincount(drawn["labels"], minlength=4)
    expected = logits[0].softmax(dim=0) * 4000
    assert (counts - expected).abs().max().item() < 4 * 4000**0.5 * 0.5
    assert counts[2] == 0


def test_squares_are_the_fisher_information_on_average(token_samples, collected):
    model, samples = tiny_classifier(), token_samples(6)
    exact = dict.fromkeys(["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense"], 0.0)
    probabilities = torch.cat(
        [model(**pad_samples([{**s, "labels": 0}])).logits.softmax(dim=-1).detach() for s in samples]
    )
    for sample, chances in zip(samples, probabilities, strict=True):
        for label, chance in enumerate(chances.tolist()):
            alone = collected(model, classes([sample], [label])).statistics
            for name in exact:
                squares = alone[name].output_grad_second_moment_diag * alone[name].num_output_tokens
                exact[name] = exact[name] + chance * squares
    trials = [
        collected(model, classes(samples, [0] * 6), batch_size=6, sampling_seed=seed).statistics for seed in range(150)
    ]
    empirical = collected(model, classes(samples, [0] * 6), batch_size=6).statistics
    for name, expected in exact.items():
        expected = expected / trials[0][name].num_output_tokens
        average = torch.stack([trial[name].output_grad_second_moment_diag for trial in trials]).mean(dim=0)
        assert (average - expected).norm() < 0.15 * expected.norm()
        assert (empirical[name].output_grad_second_moment_diag - expected).norm() > 0.3 * expected.norm()


def test_an_initialisation_with_it_depends_on_the_seed_and_not_on_the_batch_size(lora_model, token_samples):
    def update(seed, batch_size):
        model = lora_model()
        config = LoRADAConfig(
            fisher="sampled", seed=seed, batch_size=batch_size, num_samples=10, sample_selection="head", step_size=0.1
        )
        report = initialize_lora_da(model, token_samples(10), config=config, progress=False)
        assert report.config["fisher"] == "sampled"
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()

    first, batched, other = update(0, 1), update(0, 4), update(1, 4)
    torch.testing.assert_close(batched, first, rtol=1e-3, atol=1e-3 * first.abs().max().item())
    assert (other - batched).norm() > 1e-2 * batched.norm()


@pytest.mark.parametrize(
    ("compute_loss", "message"),
    [
        (
            lambda *args: model_loss(*args) * 2,
            r"the loss is [\d.]+ and the cross-entropy [\d.]+. Use fisher=.empirical",
        ),
        (lambda *args: model_loss(*args) + 1, r"needs a loss that is the cross-entropy of the logits"),
    ],
)
def test_another_loss_than_the_cross_entropy_is_refused(lora_model, token_samples, compute_loss, message):
    config = LoRADAConfig(fisher="sampled", num_samples=8, step_size=0.1)
    with pytest.raises(StatisticsError, match=message):
        initialize_lora_da(lora_model(), token_samples(8), config=config, compute_loss=compute_loss, progress=False)


def test_what_cannot_be_drawn_is_refused(tiny_llama, token_samples):
    model = tiny_llama().eval()
    batch = pad_samples(token_samples(1))

    def check(model, batch, **settings):
        settings = {"shifts_labels": True, "encoder_decoder": False, **settings}
        check_labels_can_be_sampled(model, batch, 1.0, **settings)

    with pytest.raises(StatisticsError, match=r"labels are torch\.float32"):
        check(model, {**batch, "labels": batch["labels"].float()})
    with pytest.raises(StatisticsError, match="labels are none"):
        check(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(StatisticsError, match="the batch has shift_labels too"):
        check(model, {**batch, "shift_labels": batch["labels"]})
    with pytest.raises(StatisticsError, match="needs a model that returns logits"):
        check(model.model, batch)
    with pytest.raises(StatisticsError, match=r"logits \[1, \d+, 96\] do not predict labels \[1\]"):
        check(model, {**batch, "labels": torch.zeros(1).long()}, shifts_labels=False)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(StatisticsError, match="would change what the decoder reads"):
        check(t5, batch, encoder_decoder=True)
