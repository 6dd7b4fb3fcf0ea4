"""Groups that are solved at the same time."""

import threading

import pytest
import torch
from harness import adapter_weights, assert_same_tensors, make_config, make_learnable_samples

import lora_da_hf.pipeline.solve as solve_module
from lora_da_hf import initialize_lora_da
from lora_da_hf.pipeline import memory


@pytest.fixture
def solve_on(monkeypatch, lora_model):
    def initialize(threads):
        monkeypatch.setattr(memory, "solver_threads", lambda devices: threads)
        model = lora_model()
        report = initialize_lora_da(model, make_learnable_samples(24), config=make_config(), progress=False)
        return model, report

    return initialize


def test_groups_solved_at_the_same_time_give_the_same_bits(solve_on, monkeypatch):
    workers = set()
    solve_group = solve_module.solve_group

    def noted(*args, **kwargs):
        workers.add(threading.current_thread())
        return solve_group(*args, **kwargs)

    monkeypatch.setattr(solve_module, "solve_group", noted)
    before = torch.get_num_threads()
    alone, expected = solve_on(1)
    assert workers == {threading.main_thread()}
    together, report = solve_on(3)
    assert len(workers) > 1
    assert_same_tensors(adapter_weights(together), adapter_weights(alone))
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert torch.get_num_threads() == before


def test_a_failure_on_a_thread_is_raised_and_the_threads_are_as_before(solve_on, monkeypatch):
    def fail(statistics, *args, **kwargs):
        raise ZeroDivisionError(next(iter(statistics)))

    monkeypatch.setattr(solve_module, "solve_group", fail)
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError, match="q_proj"):
        solve_on(3)
    assert torch.get_num_threads() == before
