"""Layers that do not fit at once are collected one window after the other: the same result in less memory."""

import contextlib
import dataclasses
import logging

import pytest
import torch
from harness import (
    adapter_weights,
    assert_same_tensors,
    make_config,
    make_learnable_samples,
    measured_tensors,
    turn_checkpointing_on,
)

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import PlanError
from lora_da_hf.losses import model_loss

SMALL = 350_000  # bytes: the widest layer of the tiny model takes 317,632, and all of them 532,480


@pytest.fixture
def samples():
    return make_learnable_samples(24)


def initialize(model, samples, folder=None, **overrides):
    report = initialize_lora_da(model, samples, config=make_config(**overrides), output_dir=folder, progress=False)
    return report, adapter_weights(model)


def without(report, *fields):
    return {k: v for k, v in dataclasses.asdict(report).items() if k not in {"seconds", "plan", "config", *fields}}


def test_windows_give_the_same_bits(lora_model, samples):
    whole, expected = initialize(lora_model(), samples)
    parts, found = initialize(lora_model(), samples, memory_budget=SMALL)
    assert whole.plan.startswith("one process, one pass, 12 samples")
    assert parts.plan.startswith("one process, 4 passes, each for a part of the layers, 48 samples")
    assert_same_tensors(found, expected)
    assert without(parts) == without(whole)


def test_the_plan_is_told_before_it_is_carried_out(lora_model, samples, caplog, capfd):
    caplog.set_level(logging.INFO)
    told = []

    def loss(model, batch, num_items):
        if torch.is_grad_enabled():
            told.append("LoRA-DA plan: one process, 4 passes" in caplog.text)
        return model_loss(model, batch, num_items)

    config = make_config(memory_budget=SMALL)
    initialize_lora_da(lora_model(), samples, config=config, compute_loss=loss)
    assert told
    assert all(told)
    assert "LoRA-DA plan" not in capfd.readouterr().err  # once is enough


def test_the_plan_is_told_beside_the_progress_bars_if_the_log_takes_no_such_news(lora_model, samples, caplog, capfd):
    caplog.set_level(logging.WARNING)
    report = initialize_lora_da(lora_model(), samples, config=make_config(memory_budget=SMALL))
    assert f"LoRA-DA plan: {report.plan}\n" in capfd.readouterr().err


@pytest.mark.parametrize("reentrant", [False, True])
def test_windows_give_the_same_bits_with_gradient_checkpointing(lora_model, samples, reentrant):
    def checkpointing_model():
        model = lora_model()
        turn_checkpointing_on(model.get_base_model(), reentrant=reentrant)
        return model.train()

    _, expected = initialize(checkpointing_model(), samples)
    _, found = initialize(checkpointing_model(), samples, memory_budget=f"{SMALL}B")
    assert_same_tensors(found, expected)


def test_statistics_of_windows_are_stored_like_those_of_one(tmp_path, lora_model, samples):
    for name, budget in (("whole", None), ("parts", SMALL)):
        initialize(lora_model(), samples, tmp_path / name, save_statistics=True, memory_budget=budget)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    whole, parts = (load_init(tmp_path / name) for name in ("whole", "parts"))
    assert sum(name.startswith("lora_da_statistics-") for name in parts.manifest.files) == 4
    expected = load_statistics(whole.folder, whole.manifest)
    found = load_statistics(parts.folder, parts.manifest)
    assert set(found) == set(expected)
    for name, layer in expected.items():
        assert torch.equal(found[name].input_second_moment, layer.input_second_moment)
        assert torch.equal(found[name].weight_grad, layer.weight_grad)
        assert torch.equal(found[name].output_grad_second_moment_diag, layer.output_grad_second_moment_diag)


def test_a_budget_that_no_pass_fits_in_is_an_error(lora_model, samples):
    model = lora_model()
    before = adapter_weights(model)
    with pytest.raises(PlanError, match=r"model.layers.0.mlp.down_proj \(input 80\) .* at least 317632 bytes"):
        initialize(model, samples, memory_budget=317_631)
    assert_same_tensors(adapter_weights(model), before)


def test_windows_take_the_memory_that_the_plan_says(tiny_llama, lora_model, samples):
    def peak(**settings):
        model = lora_model(model=tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=8))
        with measured_tensors() as found:
            initialize(model, samples, batch_size=1, num_samples=4, step_size=0.1, **settings)
        return found[0]

    rest = 2 * 2**20  # activations, solutions, copies of the adapter
    whole, parts = peak(), peak(memory_budget="4MiB")
    assert whole > 1.9 * parts
    assert parts < 4 * 2**20 + rest


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_do_not_depend_on_the_memory_that_is_free(tiny_llama, lora_model, samples, threads):
    """Matrices of this width are computed to other bits on another number of threads."""

    def weights(**settings):
        base = tiny_llama(hidden_size=576, intermediate_size=64, num_hidden_layers=2)
        with on_threads(threads):
            return initialize(lora_model(model=base, target_modules=["q_proj"]), samples, **settings)

    whole, expected = weights()
    parts, found = weights(memory_budget=22_500_000)
    assert ("one pass" in whole.plan, "one pass" in parts.plan) == (True, False)
    assert_same_tensors(found, expected)


@contextlib.contextmanager
def on_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
