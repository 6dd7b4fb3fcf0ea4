"""Inputs that used to give a wrong result in silence: each must be handled or refused."""

import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
from families.zoo import FAMILIES
from harness import (
    adapter_weights,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    turn_checkpointing_on,
)
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.data.data_collator import DataCollatorWithFlattening

from lora_da_hf import LoRADAConfig, LoRADATrainer, apply_init, initialize_lora_da, refit_init
from lora_da_hf.errors import AdapterAlreadyTrainedError, ConfigError, DataError, TargetError
from lora_da_hf.losses import model_loss
from lora_da_hf.samples import pad_samples

SIXTEEN = LoRADAConfig(num_samples=16, step_size=0.1, search_samples=0, sample_selection="head")
FIXED = LoRADAConfig(num_samples=12, step_size=0.1, search_samples=0, sample_selection="head")


def plain(samples):
    return [{"input_ids": s["input_ids"], "labels": s["labels"]} for s in samples]


def test_a_collator_that_joins_samples_in_one_row_does_not_change_the_statistics(lora_model, token_samples):
    samples = plain(token_samples(12))
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=False)
    reports = []
    models = [lora_model(), lora_model()]
    for model, batch_size in zip(models, (1, 4), strict=True):
        reports.append(
            initialize_lora_da(
                model, samples, config=FIXED, data_collator=collator, batch_size=batch_size, progress=False
            )
        )
    assert [report.num_samples for report in reports] == [12, 12]
    assert reports[1].batch_size == 1
    expected, found = map(adapter_weights, models)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_of_samples_in_one_row_is_counted_by_label(lora_model, token_samples, batch_size):
    samples, config = plain(token_samples(24)), LoRADAConfig(num_samples=12, step_size=0.1, search_samples=4)
    collators = (pad_samples, DataCollatorWithFlattening(return_flash_attn_kwargs=False))
    padded, joined = (
        initialize_lora_da(
            lora_model(), samples, config=config, data_collator=collator, batch_size=batch_size, progress=False
        )
        for collator in collators
    )
    assert joined.unseen_loss_before == pytest.approx(padded.unseen_loss_before, rel=1e-5)
    assert joined.unseen_loss_after == pytest.approx(padded.unseen_loss_after, rel=1e-3)


def test_a_collator_and_a_loss_that_change_what_they_are_given(lora_model, token_samples):
    samples = plain(token_samples(24))
    before = [dict(sample) for sample in samples]

    def taking_labels_out(rows):
        labels = [row.pop("labels") for row in rows]
        return pad_samples([{**row, "labels": label} for row, label in zip(rows, labels, strict=True)])

    def loss(model, batch, num_items):
        labels = batch.pop("labels")
        return model_loss(model, {**batch, "labels": labels}, num_items)

    settings = {"config": LoRADAConfig(num_samples=12, search_samples=4), "progress": False}
    expected = initialize_lora_da(lora_model(), samples, data_collator=pad_samples, **settings)
    report = initialize_lora_da(lora_model(), samples, data_collator=taking_labels_out, compute_loss=loss, **settings)
    assert samples == before
    assert report.unseen_loss_after == pytest.approx(expected.unseen_loss_after, rel=1e-5)


def test_a_collator_that_pads_in_place(lora_model, token_samples):
    samples = plain(token_samples(24))
    before = [{name: list(value) for name, value in sample.items()} for sample in samples]

    def padding_in_place(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"]))
            row["labels"] += [-100] * (longest - len(row["labels"]))
            row["input_ids"] += [0] * (longest - len(row["input_ids"]))
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    settings = {"config": LoRADAConfig(num_samples=12, search_samples=4), "progress": False}
    expected = initialize_lora_da(lora_model(), samples, data_collator=pad_samples, **settings)
    report = initialize_lora_da(lora_model(), samples, data_collator=padding_in_place, **settings)
    assert samples == before
    assert [layer.num_tokens for layer in report.layers] == [layer.num_tokens for layer in expected.layers]
    assert report.unseen_loss_after == pytest.approx(expected.unseen_loss_after, rel=1e-5)


@pytest.mark.parametrize("dimensions", [0, 4])
def test_padding_that_no_mask_of_tokens_shows_is_not_counted(lora_model, token_samples, dimensions):
    samples = plain(token_samples(24))

    def unmasked(rows):
        batch = pad_samples(rows)
        mask = batch.pop("attention_mask").bool()
        if dimensions == 4:
            causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
            allowed = mask[:, None, None, :] & causal
            batch["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        return batch

    settings = {"config": LoRADAConfig(num_samples=12, search_samples=4), "progress": False, "batch_size": 6}
    expected = initialize_lora_da(lora_model(), samples, data_collator=pad_samples, **settings)
    report = initialize_lora_da(lora_model(), samples, data_collator=unmasked, **settings)
    assert any("one sample at a time" in note for note in report.notes)
    assert [layer.num_tokens for layer in report.layers] == [layer.num_tokens for layer in expected.layers]
    assert report.unseen_loss_after == pytest.approx(expected.unseen_loss_after, rel=1e-5)


class MaskingCollator:
    """Masks labels at random, by a generator of its own that it makes at its first call if there is none."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(7)
        batch = pad_samples(rows)
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
    samples = plain(make_learnable_samples(24))
    collator, untouched = MaskingCollator(make()), MaskingCollator(make())
    config = LoRADAConfig(num_samples=12, search_samples=4)
    wrapped = functools.partial(collator)
    report = initialize_lora_da(lora_model(), samples, config=config, data_collator=wrapped, progress=False)
    assert report.search_loss_after < report.search_loss_before
    at_the_step = min(report.search, key=lambda tried: abs(tried[0] - report.step_size))
    assert report.search_loss_after == pytest.approx(at_the_step[1], rel=1e-5)  # the same masks before and after
    assert (collator.generator is None) == (make() is None)
    for _ in range(2):  # and training sees the masks that it would have seen
        assert torch.equal(collator(samples[:4])["labels"], untouched(samples[:4])["labels"])


def test_samples_beyond_a_rotary_model_s_position_embeddings_are_its_own_affair(lora_model, tiny_llama, token_samples):
    samples = plain(token_samples(24, min_length=9, max_length=20))
    model = lora_model(model=tiny_llama(max_position_embeddings=8))
    report = initialize_lora_da(model, samples, config=FIXED, progress=False)
    assert report.num_samples == 12


@pytest.mark.parametrize("packed", [[], [5]])
def test_a_packed_row_is_noted_wherever_it_is(lora_model, token_samples, packed):
    samples = [{**sample, "position_ids": list(range(len(sample["input_ids"])))} for sample in token_samples(12)]
    for index in packed:
        samples[index]["position_ids"] = [0, 1, *range(len(samples[index]["input_ids"]) - 2)]
    report = initialize_lora_da(lora_model(), samples, config=FIXED, progress=False)
    assert any("packed row of several sequences" in note for note in report.notes) == bool(packed)


def test_a_leader_without_gradient_does_not_starve_the_layers_that_share_its_input(lora_model, token_samples):
    model, alone = lora_model(target_modules=["q_proj", "k_proj", "v_proj"]), lora_model(target_modules=["v_proj"])

    def without_queries_and_keys(model, batch, num_items):
        # a uniform attention does not depend on q and k, so that the first of the layers gets no gradient
        for layer in model.get_base_model().model.layers:
            layer.self_attn.scaling = 0.0
        for layer in model.get_base_model().model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: out.detach())
            layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: out.detach())
        return model_loss(model, batch, num_items)

    def uniform(model, batch, num_items):
        for layer in model.get_base_model().model.layers:
            layer.self_attn.scaling = 0.0
        return model_loss(model, batch, num_items)

    samples = token_samples(12)
    report = initialize_lora_da(model, samples, config=FIXED, compute_loss=without_queries_and_keys, progress=False)
    initialize_lora_da(alone, samples, config=FIXED, compute_loss=uniform, progress=False)
    assert {name.rsplit(".", 1)[-1] for name in report.kept} == {"q_proj", "k_proj"}
    assert {layer.name.rsplit(".", 1)[-1] for layer in report.layers} == {"v_proj"}
    assert all(layer.num_tokens > 0 for layer in report.layers)
    expected, found = adapter_weights(alone), adapter_weights(model)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name


@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_loss_in_float16_gives_the_statistics_of_float32(batch_size):
    family = FAMILIES["BERT, sequence classification"]
    samples, found = family.samples(24), []
    for dtype in (torch.float32, torch.float16):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(family.make_model().to(dtype), make_lora_config(**family.lora))
        initialize_lora_da(model, samples, config=SIXTEEN, batch_size=batch_size, progress=False)
        found.append(adapter_weights(model))
    for name in (name for name in found[0] if "lora_B" in name):
        product, other = (weights[name] @ weights[name.replace("lora_B", "lora_A")] for weights in found)
        assert (product - other).norm() <= 0.1 * product.norm(), name


SEQ2SEQ = ("T5", "BART")


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_decoder_layers_that_are_fed_the_encoders_output_can_be_checkpointed(name, use_reentrant):
    samples, weights = FAMILIES[name].samples(16), []
    for checkpoints in (False, True):
        model = seq2seq(name)
        if checkpoints:
            turn_checkpointing_on(model, reentrant=use_reentrant)
        initialize_lora_da(
            model, samples, config=FIXED, data_collator=FAMILIES[name].collate, batch_size=4, progress=False
        )
        weights.append(adapter_weights(model))
    for key in weights[0]:
        assert torch.allclose(weights[1][key], weights[0][key], atol=1e-5), key


def with_weights(rows):
    """Give each label a weight in the loss."""
    batch = FAMILIES["T5"].collate([{k: v for k, v in row.items() if k != "weights"} for row in rows])
    return {**batch, "weights": torch.where(batch["labels"] == -100, 0.0, 1.0 + batch["labels"] % 3)}


def weighted_loss(model, batch, num_items):
    outputs = model(**{name: value for name, value in batch.items() if name != "weights"})
    losses = cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["weights"].flatten()).sum() / batch["weights"].sum()


def pairs_of(*lengths):
    return [
        {"input_ids": list(range(3, 3 + n)), "attention_mask": [1] * n, "labels": list(range(20, 20 + m))}
        for n, m in lengths
    ]


SAME_ONCE_PADDED = pairs_of((7, 2), (4, 7), (7, 3), (5, 7), (6, 5), (7, 4), (6, 7), (5, 4))


@pytest.mark.parametrize("case", ["weights", "positions"])
def test_where_a_longer_sequence_could_do_harm_samples_are_run_one_at_a_time(case):
    settings = {"weights": {"compute_loss": weighted_loss, "data_collator": with_weights}, "positions": {}}[case]
    weights = []
    for batch_size in (1, 4):
        if case == "weights":
            model = seq2seq("T5")
        else:
            family = FAMILIES["BART"]
            config = family.config()
            config.max_position_embeddings = 7
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = get_peft_model(family.model(config), make_lora_config(**family.lora))
        report = initialize_lora_da(
            model,
            SAME_ONCE_PADDED,
            config=dataclasses.replace(FIXED, num_samples=8),
            batch_size=batch_size,
            progress=False,
            **{"data_collator": FAMILIES["BART"].collate, **settings},
        )
        assert report.batch_size == 1
        weights.append(adapter_weights(model))
    for key in weights[0]:
        assert torch.equal(weights[1][key], weights[0][key]), key


def seq2seq(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(FAMILIES[name].make_model(), make_lora_config(**FAMILIES[name].lora))


def test_an_adapter_initialised_by_the_function_is_left_alone_by_the_trainer(lora_model, token_samples, tmp_path):
    model, samples = lora_model(), token_samples(12)
    initialize_lora_da(model, samples, config=FIXED, progress=False)
    trainer = LoRADATrainer(
        model=model,
        args=make_args(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=samples,
        data_collator=pad_samples,
        da_config=FIXED,
    )
    before = adapter_weights(model)
    trainer.train()
    after = adapter_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.lora_da_report is None
    with pytest.raises(AdapterAlreadyTrainedError):
        initialize_lora_da(model, samples, config=FIXED, progress=False)


def test_an_adapter_that_was_deleted_and_added_again_is_a_fresh_one(lora_model, token_samples, tmp_path):
    model, samples = lora_model(), token_samples(12)
    arguments = {"train_dataset": samples, "data_collator": pad_samples, "da_config": FIXED}
    LoRADATrainer(model=model, args=make_args(tmp_path / "a", max_steps=1), **arguments).train()
    model.add_adapter("other", make_lora_config())
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", make_lora_config())
    model.set_adapter("default")
    again = LoRADATrainer(model=model, args=make_args(tmp_path / "b", max_steps=1), **arguments)
    again.train()
    assert again.lora_da_report is not None


def test_a_users_optimizer_gets_b_alone_if_a_is_frozen(lora_model, token_samples, tmp_path):
    model, samples = lora_model(), token_samples(12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = LoRADATrainer(
        model=model,
        args=make_args(tmp_path, max_steps=1),
        train_dataset=samples,
        data_collator=pad_samples,
        optimizers=(optimizer, None),
        da_config=LoRADAConfig(**{**FIXED.to_dict(), "freeze_a": True}),
    )
    trainer.train()
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert trained
    assert all("lora_B" in name for name in trained)


def test_samples_that_are_a_mapping_of_columns_and_a_population_that_is_none(lora_model, token_samples):
    with pytest.raises(DataError, match="samples is a mapping; give a list"):
        initialize_lora_da(lora_model(), {"input_ids": [[1, 2]]}, config=FIXED, progress=False)
    with pytest.raises(ConfigError, match="population_size=-5 must be at least 1"):
        initialize_lora_da(lora_model(), token_samples(12), config=FIXED, population_size=-5, progress=False)


def test_the_fingerprint_sees_layers_that_have_no_adapter(lora_model):
    from lora_da_hf.pipeline.base_model import base_model_facts

    model, same = lora_model(target_modules=["q_proj"]), lora_model(target_modules=["v_proj", "up_proj"])
    expected = base_model_facts(model).weights_sha256
    assert base_model_facts(same).weights_sha256 == expected
    assert base_model_facts(same.bfloat16()).weights_sha256 == expected
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert base_model_facts(model).weights_sha256 != expected


class Wrapped(torch.nn.Module):
    """A PEFT model inside of another module, as a model with a value head is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, **batch):
        return self.inner(**batch)


def test_a_model_that_cannot_be_stored_is_initialised_without_a_folder_and_else_refused_before(
    tmp_path, lora_model, token_samples
):
    calls = []

    def loss(model, batch, items):
        calls.append(batch)
        return model_loss(model, batch, items)

    wrapped = Wrapped(lora_model())
    with pytest.raises(TargetError, match=r"The adapter of a Wrapped cannot be stored.*Without output_dir"):
        initialize_lora_da(
            wrapped, token_samples(12), config=FIXED, compute_loss=loss, output_dir=tmp_path / "init", progress=False
        )
    assert not calls
    report = initialize_lora_da(wrapped, token_samples(12), config=FIXED, progress=False)
    assert len(report.layers) == len(initialize_lora_da(lora_model(), token_samples(12), config=FIXED).layers)


def test_a_collator_that_masks_at_random_is_named_as_the_reason_for_single_samples(lora_model, token_samples):
    def masking(samples):
        batch = pad_samples([{"input_ids": sample["input_ids"]} for sample in samples])
        chosen = torch.rand(batch["input_ids"].shape) < 0.5
        chosen[:, 1] = True
        batch["labels"] = torch.where(chosen, batch["input_ids"], -100)
        return batch

    report = initialize_lora_da(
        lora_model(), token_samples(12), config=FIXED, data_collator=masking, batch_size=4, progress=False
    )
    assert report.batch_size == 1
    assert any("the collator draws at random" in note for note in report.notes)


def test_a_loss_that_rises_on_unseen_samples_is_a_warning(lora_model, token_samples, caplog):
    config = dataclasses.replace(FIXED, step_size=30.0, search_samples=4)
    report = initialize_lora_da(lora_model(), token_samples(24), config=config, progress=False)
    assert report.unseen_loss_after > report.unseen_loss_before
    assert any(note.startswith("on samples that nothing had seen the loss rose from") for note in report.notes)
    assert "LoRA-DA: on samples that nothing had seen the loss rose from" in caplog.text


def test_layers_that_keep_pefts_initialisation_are_a_warning(lora_model, token_samples, caplog):
    initialize_lora_da(lora_model(), token_samples(12), config=FIXED, progress=False)
    assert "PEFT's own" not in caplog.text
    model = lora_model(target_modules=["q_proj", "embed_tokens"])
    initialize_lora_da(model, token_samples(12), config=FIXED, progress=False)
    assert "embed_tokens keeps PEFT's own initialisation (Embedding is not a linear layer)" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_experts_that_no_token_that_counts_goes_through_are_kept_whatever_the_batch(
    token_samples, token_mask, batch_size
):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"num_experts": 32, "num_experts_per_tok": 2, "initializer_range": 0.2, "pad_token_id": 0},
    )
    model = get_peft_model(
        Qwen3MoeForCausalLM(config),
        LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    )
    settings = dataclasses.replace(FIXED, token_mask=token_mask, batch_size=batch_size)
    report = initialize_lora_da(model, token_samples(12), config=settings, progress=False)
    assert len(report.layers) + len(report.kept) == 33
    reasons = {"no token is routed to it", "no token that counts goes through it", "its gradient is zero"}
    assert report.kept
    assert set(report.kept.values()) <= reasons


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_of_samples_that_become_two_rows_does_not_depend_on_the_batch(lora_model, token_samples, batch_size):
    def twice(samples):
        return pad_samples([row for sample in samples for row in (sample, sample)])

    config = LoRADAConfig(num_samples=8, step_size=0.1, search_samples=4)
    reports = [
        initialize_lora_da(
            lora_model(), token_samples(24), config=config, data_collator=collator, batch_size=size, progress=False
        )
        for collator, size in ((pad_samples, 1), (twice, batch_size))
    ]
    assert reports[1].unseen_loss_before == pytest.approx(reports[0].unseen_loss_before, rel=1e-4)
    assert reports[1].unseen_loss_before < 10  # and no sum


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


def test_a_layer_that_also_runs_without_its_adapter_is_kept(token_samples):
    model = get_peft_model(TwoNames(), LoraConfig(r=4, target_modules=["linear", "last"]))
    report = initialize_lora_da(
        model, token_samples(12), config=FIXED, compute_loss=lambda m, batch, _: m(**batch)["loss"], progress=False
    )
    assert [layer.name for layer in report.layers] == ["last"]
    assert report.kept == {"first.linear": "its base layer also runs as second.linear, without the adapter"}


def router_of_one_expert():
    """A model whose routers, which are linear layers, normalise the weight of the one expert that they pick to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HunYuanMoEV1ForCausalLM(
            HunYuanMoEV1Config(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=4,
                moe_topk=1,
                initializer_range=0.2,
                pad_token_id=0,
                max_position_embeddings=64,
            )
        )


def test_a_router_of_which_the_gradient_is_rounding_hardly_moves_and_holds_no_other_back(tmp_path, lora_model):
    samples, config = make_learnable_samples(64), make_config(save_statistics=True)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model, again = (lora_model(model=router_of_one_expert(), target_modules=[*attention, "wg"]) for _ in range(2))
    report = initialize_lora_da(model, samples, config=config, output_dir=tmp_path / "init", progress=False)
    without = lora_model(model=router_of_one_expert(), target_modules=attention)
    expected = initialize_lora_da(without, samples, config=make_config(), progress=False)
    assert sum("mlp.gate.wg and 1 other layers hardly move" in note for note in report.notes) == 1
    assert not any("hardly move" in note for note in expected.notes)
    assert report.search_loss_after < 0.9 * report.search_loss_before
    assert report.search_loss_after == pytest.approx(expected.search_loss_after, rel=0.05)
    used = apply_init(again, tmp_path / "init")
    refitted = refit_init(tmp_path / "init", tmp_path / "new", rank=2)
    for notes in (used.notes, refitted.report.notes):
        assert sum("hardly move" in note for note in notes) == 1
