"""Inputs that could give a wrong result in silence: each is handled, or run one sample at a time with a note."""

import functools
import random

import numpy as np
import pytest
import torch
from families.zoo import FAMILIES
from harness import (
    assert_updates_equal,
    collate,
    initialize,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    model_loss,
    turn_checkpointing_on,
    written_updates,
)
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.data.data_collator import DataCollatorWithFlattening

from lora_da_hf import LoRADATrainer, apply_init, refit_init
from lora_da_hf.errors import AdapterAlreadyTrainedError

FIXED = {"num_samples": 12, "step_size": 0.1, "search_samples": 0}
join = DataCollatorWithFlattening(return_flash_attn_kwargs=False)


@pytest.fixture
def rows(token_samples):
    """Return 24 samples without a mask."""
    return [{"input_ids": s["input_ids"], "labels": s["labels"]} for s in token_samples(24)]


def one_at_a_time(report):
    return any("one sample at a time" in note for note in report.notes)


# Collators


def test_a_collator_that_joins_samples_in_one_row_does_not_change_the_statistics(lora_model, rows):
    models = [lora_model(), lora_model()]
    reports = [
        initialize(model, rows[:12], collator=join, batch_size=size, **FIXED)
        for model, size in zip(models, (1, 4), strict=True)
    ]
    assert [report.num_samples for report in reports] == [12, 12]
    assert reports[1].batch_size == 1
    assert_updates_equal(*map(written_updates, models), 1e-4)


def twice(samples):
    """Make two rows of each sample."""
    return collate([sample for sample in samples for _ in range(2)])


def take_labels_out(samples):
    """Change the samples themselves."""
    labels = [sample.pop("labels") for sample in samples]
    return collate([{**row, "labels": label} for row, label in zip(samples, labels, strict=True)])


def pad_in_place(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    for sample in samples:
        for name, value in (("attention_mask", 0), ("labels", -100), ("input_ids", 0)):
            sample[name] += [value] * (longest - len(sample[name]))
    return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("collator", [join, twice, take_labels_out, pad_in_place])
def test_what_a_collator_does_changes_neither_losses_nor_samples(lora_model, token_samples, collator, batch_size):
    samples = token_samples(24)
    before = [{name: list(value) for name, value in sample.items()} for sample in samples]

    def loss(model, batch, num_items):
        labels = batch.pop("labels")
        return model_loss(model, {**batch, "labels": labels}, num_items)

    settings = {"search_samples": 4, "step_size": 0.1}
    expected = initialize(lora_model(), samples, **settings)
    found = initialize(lora_model(), samples, collator=collator, batch_size=batch_size, loss=loss, **settings)
    assert samples == before
    assert found.unseen_loss_before == pytest.approx(expected.unseen_loss_before, rel=1e-4)
    assert found.unseen_loss_after == pytest.approx(expected.unseen_loss_after, rel=1e-3)
    if collator in (take_labels_out, pad_in_place):
        assert [layer.num_tokens for layer in found.layers] == [layer.num_tokens for layer in expected.layers]


@pytest.mark.parametrize("dimensions", [0, 4])
def test_padding_that_no_mask_of_tokens_shows_is_not_counted(lora_model, token_samples, dimensions):
    def unmasked(samples):
        batch = collate(samples)
        mask = batch.pop("attention_mask").bool()
        if dimensions == 4:
            causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
            allowed = mask[:, None, None, :] & causal
            batch["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        return batch

    settings = {"search_samples": 4, "batch_size": 6}
    expected = initialize(lora_model(), token_samples(24), **settings)
    report = initialize(lora_model(), token_samples(24), collator=unmasked, **settings)
    assert one_at_a_time(report)
    assert [layer.num_tokens for layer in report.layers] == [layer.num_tokens for layer in expected.layers]
    assert report.unseen_loss_after == pytest.approx(expected.unseen_loss_after, rel=1e-5)


class MaskingCollator:
    """Masks labels at random, by a generator of its own that it makes at its first call if there is none."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, samples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(7)
        batch = collate(samples)
        masked = self.draw(batch["labels"].shape) < 0.3
        masked[:, -3:] = False
        return {**batch, "labels": batch["labels"].masked_fill(masked, -100)}

    def draw(self, shape):
        if isinstance(self.generator, torch.Generator):
            return torch.rand(shape, generator=self.generator)
        if isinstance(self.generator, random.Random):
            return torch.tensor([self.generator.random() for _ in range(shape.numel())]).view(shape)
        return torch.from_numpy(self.generator.uniform(size=tuple(shape)))


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(7),
    "numpy": lambda: np.random.default_rng(7),
    "numpy's old one": lambda: np.random.RandomState(7),
    "python": lambda: random.Random(7),
    "made at the first call": lambda: None,
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_a_collator_with_a_generator_of_its_own(lora_model, make):
    samples = make_learnable_samples(64)
    collator, untouched = MaskingCollator(make()), MaskingCollator(make())
    report = initialize(lora_model(), samples, collator=functools.partial(collator), search_samples=16)
    assert report.search_loss_after < report.search_loss_before
    assert report.search_loss_after == pytest.approx(dict(report.search)[report.step_size], rel=1e-5)
    assert (collator.generator is None) == (make() is None)
    for _ in range(2):  # and training sees the masks that it would have seen
        assert torch.equal(collator(samples[:4])["labels"], untouched(samples[:4])["labels"])


def test_a_collator_that_masks_at_random_is_named_as_the_reason_for_single_samples(lora_model, samples):
    def masking(rows):
        batch = collate(rows)
        masked = torch.rand(batch["input_ids"].shape) < 0.5
        masked[:, 1] = True
        return {**batch, "labels": batch["input_ids"].where(masked, torch.tensor(-100))}

    report = initialize(lora_model(), samples, collator=masking, batch_size=4, **FIXED)
    assert report.batch_size == 1
    assert any("draws at random" in note for note in report.notes)


# Half precision


@pytest.mark.parametrize("batch_size", [4, 12])
@pytest.mark.parametrize("kind", ["autocast", "half"])
def test_a_loss_in_float16_gives_the_statistics_of_float32(samples, batch_size, kind):
    """Gradients of this size underflow in float16 unless they are scaled."""
    family, found = FAMILIES["BERT, sequence classification"], []
    for dtype in (torch.float32, torch.float16):
        model = family_model("BERT, sequence classification", dtype=dtype if kind == "half" else torch.float32)

        def loss(model, batch, num_items, dtype=dtype):
            with torch.autocast("cpu", dtype=torch.float16, enabled=kind == "autocast" and dtype == torch.float16):
                return 1e-3 * model_loss(model, batch, None)

        initialize(model, family.samples(12), loss=loss, collator=None, batch_size=batch_size, **FIXED)
        found.append(written_updates(model))
    assert_updates_equal(found[1], found[0], 0.1)


# Layers


def test_a_leader_without_gradient_does_not_starve_the_layers_that_share_its_input(lora_model, samples):
    def uniform(model, batch, num_items):
        """Make attention uniform, so that it does not depend on queries and keys."""
        for layer in model.get_base_model().model.layers:
            layer.self_attn.scaling = 0.0
        return model_loss(model, batch, num_items)

    def cut(model, batch, num_items):
        for layer in model.get_base_model().model.layers:
            for which in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                which.register_forward_hook(lambda m, a, out: out.detach())
        return uniform(model, batch, num_items)

    model, alone = lora_model(target_modules=["q_proj", "k_proj", "v_proj"]), lora_model(target_modules=["v_proj"])
    report = initialize(model, samples, loss=cut, **FIXED)
    initialize(alone, samples, loss=uniform, **FIXED)
    assert {name.rsplit(".", 1)[-1] for name in report.kept} == {"q_proj", "k_proj"}
    assert set(report.kept.values()) == {"the loss does not depend on it"}
    assert all(layer.num_tokens > 0 for layer in report.layers)
    found = written_updates(model)
    assert_updates_equal({name: found[name] for name in written_updates(alone)}, written_updates(alone), 1e-4)


class TwoNames(torch.nn.Module):
    """A linear layer that runs under two names, of which PEFT adapts the first."""

    def __init__(self):
        super().__init__()
        shared = torch.nn.Linear(32, 32)
        self.embeddings = torch.nn.Embedding(96, 32)
        self.first, self.second = torch.nn.ModuleDict({"linear": shared}), torch.nn.ModuleDict({"linear": shared})
        self.last, self.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 96)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embeddings(input_ids)
        for layer in (self.first["linear"], self.second["linear"], self.last):
            hidden = hidden + torch.tanh(layer(hidden))
        logits = self.head(hidden)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_layer_that_also_runs_without_its_adapter_is_kept(samples):
    model = get_peft_model(TwoNames(), make_lora_config(target_modules=["linear", "last"]))
    report = initialize(model, samples, loss=lambda model, batch, _: model(**batch)["loss"], **FIXED)
    assert [layer.name for layer in report.layers] == ["last"]
    assert set(report.kept) == {"first.linear"}
    assert "second.linear" in report.kept["first.linear"]


SMALL_DECODER = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0},
}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_experts_that_no_token_that_counts_goes_through_are_kept_whatever_the_batch(samples, token_mask, batch_size):
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 24, "num_hidden_layers": 1, "num_experts": 32, "num_experts_per_tok": 2}
    lora = make_lora_config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL_DECODER, **sizes)), lora)
    report = initialize(model, samples, token_mask=token_mask, batch_size=batch_size, **FIXED)
    assert len(report.layers) + len(report.kept) == 33
    assert report.kept
    assert all(name.endswith("]") for name in report.kept)


def router_of_one_expert():
    """Make a model whose routers, which are linear layers, normalise the weight of the one expert they pick to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 2, "num_experts": 4, "moe_topk": 1, "max_position_embeddings": 64}
        return HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**SMALL_DECODER, **sizes))


def test_a_router_of_which_the_gradient_is_rounding_hardly_moves_and_holds_no_other_back(tmp_path, lora_model):
    samples, attention = make_learnable_samples(64), ["q_proj", "k_proj", "v_proj", "o_proj"]
    model, again = (lora_model(model=router_of_one_expert(), target_modules=[*attention, "wg"]) for _ in range(2))
    report = initialize(model, samples, tmp_path / "init", save_statistics=True)
    expected = initialize(lora_model(model=router_of_one_expert(), target_modules=attention), samples)
    assert report.search_loss_after < 0.9 * report.search_loss_before
    assert report.search_loss_after == pytest.approx(expected.search_loss_after, rel=0.05)
    used = apply_init(again, tmp_path / "init")
    refitted = refit_init(tmp_path / "init", tmp_path / "new", rank=2)
    for notes in (report.notes, used.notes, refitted.report.notes):
        assert sum("mlp.gate.wg" in note for note in notes) == 1
    assert not any("wg" in note for note in expected.notes)


# Encoders and decoders


def family_model(name, dtype=torch.float32, **config):
    family = FAMILIES[name]
    settings = family.config()
    for key, value in config.items():
        setattr(settings, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(family.model(settings).to(dtype), make_lora_config(**family.lora))


@pytest.mark.parametrize("name", ["T5", "BART"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_decoder_layers_that_are_fed_the_encoders_output_can_be_checkpointed(name, use_reentrant):
    found = []
    for checkpoints in (False, True):
        model = family_model(name)
        if checkpoints:
            turn_checkpointing_on(model, reentrant=use_reentrant)
        initialize(model, FAMILIES[name].samples(16), collator=FAMILIES[name].collate, batch_size=4, **FIXED)
        found.append(written_updates(model))
    assert_updates_equal(found[1], found[0], 1e-4)


def with_weights(samples):
    """Give each label a weight in the loss."""
    batch = FAMILIES["T5"].collate(samples)
    return {**batch, "weights": torch.where(batch["labels"] == -100, 0.0, 1.0 + batch["labels"] % 3)}


def weighted_loss(model, batch, num_items):
    outputs = model(**{name: value for name, value in batch.items() if name != "weights"})
    losses = cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["weights"].flatten()).sum() / batch["weights"].sum()


LENGTHS = [(7, 2), (4, 7), (7, 3), (5, 7), (6, 5), (7, 4), (6, 7), (5, 4)]
"""Of inputs and labels: batches that are as long as one another once they are padded."""


@pytest.mark.parametrize("case", ["weights", "positions"])
def test_two_sides_that_are_as_long_in_a_batch_are_told_apart(case):
    samples = [
        {"input_ids": list(range(3, 3 + n)), "attention_mask": [1] * n, "labels": list(range(20, 20 + m))}
        for n, m in LENGTHS
    ]
    settings = {"collator": FAMILIES["BART"].collate, "num_samples": 8, "step_size": 0.1, "search_samples": 0}
    if case == "weights":
        settings |= {"loss": weighted_loss, "collator": with_weights}
    found = []
    for batch_size in (1, 4):
        model = family_model("T5") if case == "weights" else family_model("BART", max_position_embeddings=7)
        report = initialize(model, samples, batch_size=batch_size, **settings)
        assert report.batch_size == (1 if case == "weights" else batch_size)
        found.append(written_updates(model))
    assert_updates_equal(found[1], found[0], 1e-4)


# A trainer


def test_an_adapter_initialised_by_the_function_is_left_alone_by_the_trainer(lora_model, samples, tmp_path):
    model = lora_model()
    settings = {"train_dataset": samples, "data_collator": collate, "da_config": make_config()}
    initialize(model, samples)
    trainer = LoRADATrainer(model=model, args=make_args(tmp_path, learning_rate=0.0), **settings)
    before = written_updates(model)
    trainer.train()
    assert_updates_equal(written_updates(model), before, 0)
    assert trainer.lora_da_report is None
    with pytest.raises(AdapterAlreadyTrainedError):
        initialize(model, samples)
    model.add_adapter("other", make_lora_config())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", make_lora_config())  # a fresh one of that name
    model.set_adapter("default")
    again = LoRADATrainer(model=model, args=make_args(tmp_path / "b"), **settings)
    again.train()
    assert again.lora_da_report is not None
