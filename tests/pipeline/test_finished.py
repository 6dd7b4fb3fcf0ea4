"""A finished initialisation is found again by the facts that it was made of; if one differs it is made anew."""

import pytest
import torch
from harness import (
    adapter_weights,
    assert_same_tensors,
    collate,
    make_config,
    make_learnable_samples,
    model_loss,
)

from lora_da_hf import initialize_lora_da, load_init
from lora_da_hf.errors import AdapterAlreadyTrainedError


class Counting:
    """A loss that counts the batches that a gradient is taken of."""

    compared = 3
    """Of the probe, which every start has."""

    def __init__(self):
        self.count = 0

    def __call__(self, model, batch, num_items):
        self.count += torch.is_grad_enabled()
        return model_loss(model, batch, num_items)


def initialize(model, samples, folder, loss=None, **settings):
    given = {name: settings.pop(name) for name in ("seed", "population_size") if name in settings}
    report = initialize_lora_da(
        model,
        samples,
        config=make_config(**{"batch_size": 2, **settings}),
        data_collator=collate,
        compute_loss=loss,
        output_dir=folder,
        progress=False,
        **given,
    )
    return report, adapter_weights(model)


def was_found(report):
    return any(note.startswith("reusing") for note in report.notes)


def test_a_second_start_with_the_same_facts_skips_the_pass(tmp_path, lora_model, samples):
    first, expected = initialize(lora_model(), samples, tmp_path / "init")
    loss, model = Counting(), lora_model()
    settings = {"batch_size": 4, "memory_budget": 300_000, "freeze_a": True}
    second, found = initialize(model, samples, tmp_path / "init", loss, **settings)
    assert loss.count <= loss.compared
    assert was_found(second)
    assert_same_tensors(found, expected)
    assert second.notes[:-1] == first.notes
    assert second.layers == first.layers
    assert second.step_size == first.step_size
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    with pytest.raises(AdapterAlreadyTrainedError):
        initialize(model, samples, tmp_path / "init")


def preference(sign):
    """Make a loss as DPO's: log 2 at the base, whatever it asks for."""

    def loss(model, batch, num_items):
        with torch.no_grad(), model.disable_adapter():
            reference = model_loss(model, batch, None)
        return -torch.nn.functional.logsigmoid(sign * (reference - model_loss(model, batch, None)))

    return loss


@pytest.mark.parametrize(
    "settings", [{}, {"num_samples": 24, "step_size": 0.05, "search_samples": 0}], ids=["search", "no sample left"]
)
def test_a_loss_that_every_base_begins_with_alike_is_told_from_another(tmp_path, lora_model, samples, settings):
    settings = {"loss_reduction": "sample_mean", **settings}
    initialize(lora_model(), samples, tmp_path / "init", preference(1.0), **settings)
    report, found = initialize(lora_model(), samples, tmp_path / "init", preference(-1.0), **settings)
    assert not was_found(report)
    _, expected = initialize(lora_model(), samples, tmp_path / "alone", preference(-1.0), **settings)
    assert_same_tensors(found, expected)
    again, found = initialize(lora_model(), samples, tmp_path / "init", preference(-1.0), **settings)
    assert was_found(again)
    assert_same_tensors(found, expected)


def weighted(weight):
    """Make a loss whose mean over a single sample is the same whatever the weight of a class is."""

    def loss(model, batch, items):
        labels = batch["labels"][:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(
            model(**batch).logits[:, :-1].flatten(0, 1), labels, reduction="none"
        )
        weights = torch.where(labels % 2 == 1, weight, 1.0).masked_fill(labels == -100, 0)
        return (losses * weights).sum() / weights.sum()

    return loss


def test_a_loss_that_weighs_some_samples_anew_is_another_loss(tmp_path, lora_model, samples):
    for weight in (1.0, 10.0):
        settings = {"loss_reduction": "token_mean"}
        assert not was_found(initialize(lora_model(), samples, tmp_path / "init", weighted(weight), **settings)[0])


def test_a_second_start_of_a_float64_adapter_has_the_same_bits(tmp_path, tiny_llama, lora_model, samples):
    first, second = (
        initialize(lora_model(model=tiny_llama(dtype=torch.float64)), samples, tmp_path / "init") for _ in range(2)
    )
    assert was_found(second[0])
    assert {tensor.dtype for tensor in second[1].values()} == {torch.float64}
    assert_same_tensors(second[1], first[1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"settings": {"input_damping": 0.01}}, "settings"),
        ({"settings": {"seed": 1}}, "samples"),
        ({"settings": {"save_statistics": True}}, "save_statistics"),
        ({"settings": {"max_rank": 6}}, "settings"),
        ({"settings": {"search_samples": 2}}, "samples"),
        ({"settings": {"population_size": 1000}}, "settings"),
        ({"lora": {"lora_alpha": 8}}, "adapter"),
        ({"lora": {"r": 2}}, "adapter"),
        ({"lora": {"target_modules": ["q_proj"]}}, "adapter"),
        ({"lora": {"use_dora": True}}, "adapter"),
        ({"lora": {"lora_dropout": 0.5}}, "adapter"),
        ({"lora": {"init_lora_weights": "gaussian"}}, "adapter"),
        ({"llama": {"seed": 1}}, "base model"),
        ({"llama": {"dtype": torch.bfloat16}}, "base model"),
        ({"samples": make_learnable_samples(24, seed=1)}, "samples"),
        ({"loss": lambda model, batch, items: 2 * model_loss(model, batch, items)}, "loss"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "-".join(value),
)
def test_anything_that_matters_makes_it_anew(tmp_path, tiny_llama, lora_model, samples, caplog, change, what):
    initialize(lora_model(), samples, tmp_path / "init")
    before = load_init(tmp_path / "init").manifest
    caplog.set_level("INFO")
    report, _ = initialize(
        lora_model(model=tiny_llama(**change.get("llama", {})), **change.get("lora", {})),
        change.get("samples", samples),
        tmp_path / "init",
        change.get("loss"),
        **change.get("settings", {}),
    )
    assert not was_found(report)
    assert any(what in record.message for record in caplog.records)
    assert load_init(tmp_path / "init").manifest != before


def test_stored_statistics_are_kept_by_a_start_that_asks_for_none(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    before = load_init(tmp_path / "init").manifest
    assert was_found(initialize(lora_model(), samples, tmp_path / "init")[0])
    assert load_init(tmp_path / "init").manifest == before


def test_the_same_base_under_another_path_finds_it(tmp_path, lora_model, samples):
    def initialized_at(path):
        model = lora_model()
        model.config._name_or_path = str(path)
        return initialize(model, samples, tmp_path / "init")[0]

    initialized_at(tmp_path / "here")
    assert was_found(initialized_at(tmp_path / "there"))


def test_a_broken_one_is_replaced_and_that_is_said(tmp_path, lora_model, samples, caplog):
    _, expected = initialize(lora_model(), samples, tmp_path / "init")
    adapter = tmp_path / "init" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-4])
    report, found = initialize(lora_model(), samples, tmp_path / "init")
    assert_same_tensors(found, expected)
    assert any("replaced" in note for note in report.notes)
    assert not any(str(tmp_path) in note for note in report.notes)
    assert str(tmp_path / "init") in caplog.text
    load_init(tmp_path / "init")
