"""Layers that do not fit at once are collected one window after the other: the same result in less memory."""

import contextlib
import dataclasses
import logging

import pytest
import torch
from harness import (
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    initialize,
    make_config,
    measured_tensors,
    model_loss,
    stored_statistics,
    turn_checkpointing_on,
)

from lora_da_hf import initialize_lora_da
from lora_da_hf.errors import PlanError

SMALL = 300_000  # bytes: the widest layer of the tiny model takes 266,432, and all of them 481,280


def passes(report):
    return 1 if "one pass" in report.plan else int(report.plan.partition(" passes")[0].rpartition(" ")[2])


def without(report, *fields):
    return {k: v for k, v in dataclasses.asdict(report).items() if k not in {"seconds", "plan", "config", *fields}}


def test_windows_give_the_same_bits_and_statistics(tmp_path, lora_model, samples):
    whole, parts = lora_model(), lora_model()
    expected = initialize(whole, samples, tmp_path / "whole", save_statistics=True)
    report = initialize(parts, samples, tmp_path / "parts", save_statistics=True, memory_budget=SMALL)
    assert (passes(expected), passes(report)) == (1, 4)
    assert_same_tensors(adapter_weights(parts), adapter_weights(whole))
    assert without(report, "artifact") == without(expected, "artifact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    found, expected = (stored_statistics(tmp_path / name) for name in ("parts", "whole"))
    assert_statistics_equal(found, expected, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_windows_give_the_same_bits_with_gradient_checkpointing(lora_model, samples, reentrant):
    found = []
    for budget in (None, str(SMALL)):
        model = lora_model()
        turn_checkpointing_on(model.get_base_model(), reentrant=reentrant)
        initialize(model.train(), samples, memory_budget=budget)
        found.append(adapter_weights(model))
    assert_same_tensors(*found)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_the_plan_is_told_once_before_it_is_carried_out(lora_model, samples, caplog, capfd, level):
    """In the log, or beside the progress bars if the log takes no such news."""
    caplog.set_level(level, logger="lora_da_hf")  # which run_clm.py sets
    told = []

    def loss(model, batch, num_items):
        if torch.is_grad_enabled():
            told.append("LoRA-DA plan" in caplog.text)
        return model_loss(model, batch, num_items)

    config = make_config(memory_budget=SMALL)
    report = initialize_lora_da(lora_model(), samples, config=config, compute_loss=loss)
    assert told[-1] == (level == logging.INFO)
    assert (f"LoRA-DA plan: {report.plan}" in capfd.readouterr().err) == (level == logging.WARNING)


def test_a_budget_that_no_pass_fits_in_is_an_error(lora_model, samples):
    model = lora_model()
    before = adapter_weights(model)
    with pytest.raises(PlanError, match=r"model.layers.0.mlp.down_proj .*266432 bytes"):
        initialize(model, samples, memory_budget=266_431)
    assert_same_tensors(adapter_weights(model), before)


def test_windows_take_the_memory_that_the_plan_says(tiny_llama, lora_model, samples):
    def peak(**settings):
        model = lora_model(model=tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=8))
        with measured_tensors() as found:
            initialize(model, samples, batch_size=1, num_samples=4, step_size=0.1, **settings)
        return found[0]

    rest = 2.5 * 2**20  # activations, solutions, copies of the adapter
    whole, parts = peak(), peak(memory_budget="4MiB")
    assert whole > 1.9 * parts
    assert parts < 4 * 2**20 + rest


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_do_not_depend_on_the_memory_that_is_free(tiny_llama, lora_model, samples, threads):
    """Matrices of this width are computed to other bits on another number of threads."""
    found, counts = [], []
    for budget in (None, 20_000_000):
        base = tiny_llama(hidden_size=576, intermediate_size=64, num_hidden_layers=2)
        model = lora_model(model=base, target_modules=["q_proj"])
        with on_threads(threads):
            counts.append(passes(initialize(model, samples, memory_budget=budget)))
        found.append(adapter_weights(model))
    assert counts == [1, 2]
    assert_same_tensors(*found)


@contextlib.contextmanager
def on_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
