"""Two gloo processes without a trainer, against one."""

import shutil

import pytest
from conftest import make_tiny_llama
from harness import (
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    assert_updates_equal,
    collate,
    factors,
    initialize,
    make_learnable_samples,
    stored_statistics,
    written_adapter,
)
from launching import launch, result
from safetensors.torch import load_file
from worker import CELLS, DIFFERING, SEVEN

from lora_da_hf import apply_init, refit_init

pytestmark = [pytest.mark.multi_rank, pytest.mark.xdist_group("two processes")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, stored_init):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(stored_init, folder / "stored_0")
    refit_init(stored_init, folder / "stored_1", rank=5)
    make_tiny_llama().save_pretrained(folder / "base")
    launch("worker.py", [], folder)
    return folder


def adapter(folder, name, process):
    return load_file(folder / f"{name}.process{process}.safetensors")


def products(weights):
    return {
        name: weights[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in factors(weights, "A").items()
    }


@pytest.mark.parametrize("name", CELLS)
def test_statistics_and_adapter_are_those_of_one_process(launched, tmp_path, lora_model, name):
    count, settings = CELLS[name]
    model = lora_model()
    report = initialize(model, make_learnable_samples(count), tmp_path / "single", **SEVEN, **settings)
    found, expected = stored_statistics(launched / name), stored_statistics(tmp_path / "single")
    assert_statistics_equal(found, expected, 1e-5)
    for process in range(2):
        theirs = result(launched, name, process)
        assert theirs["num_samples"] == report.num_samples == count
        assert theirs["data_fingerprint"] == report.data_fingerprint
        assert theirs["step_unit"] == pytest.approx(report.step_unit, rel=1e-5)
        assert [layer["num_tokens"] for layer in theirs["layers"]] == [layer.num_tokens for layer in report.layers]
        assert_same_tensors(adapter(launched, name, process), written_adapter(launched / name))
    assert_updates_equal(products(adapter(launched, name, 0)), products(adapter_weights(model)), 1e-4)


def test_windows_have_the_bits_of_one_window(launched):
    assert_same_tensors(adapter(launched, "windows", 1), adapter(launched, "plain", 0))
    assert "one pass" in result(launched, "plain", 0)["plan"]
    assert "one pass" not in result(launched, "windows", 0)["plan"]


def test_both_processes_start_from_a_stored_initialisation_as_one_would(launched, lora_model):
    model = lora_model(r=4)
    report = apply_init(model, launched / "stored_0")
    for process in range(2):
        assert_same_tensors(adapter(launched, "used", process), adapter_weights(model))
        found = result(launched, "used", process)
        assert (found["step_size"], found["init_from"]) == (report.step_size, report.init_from)


def test_both_processes_search_the_step_together(launched, lora_model):
    model, samples = lora_model(r=4), make_learnable_samples(31)
    settings = {"samples": samples, "step_size": "line_search", "data_collator": collate, "batch_size": 3}
    report = apply_init(model, launched / "stored_0", progress=False, **settings)
    found = [result(launched, "searched", process) for process in range(2)]
    assert found[0]["search"] == found[1]["search"]
    assert found[0]["step_size"] == pytest.approx(report.step_size, rel=1e-4)
    assert found[0]["search_loss_after"] == pytest.approx(report.search_loss_after, rel=1e-5)
    assert_same_tensors(*(adapter(launched, "searched", process) for process in range(2)))
    assert_updates_equal(products(adapter(launched, "searched", 0)), products(adapter_weights(model)), 1e-4)


@pytest.mark.parametrize("name", [*DIFFERING, "stored"])
def test_processes_that_differ_are_refused_on_both_by_name(launched, name):
    for process in range(2):
        found = result(launched, name, process)
        kind, _, message = (found["message"] or "").partition(": ")
        assert kind == ("ArtifactError" if name == "stored" else "ConfigError"), found["message"]
        assert ("initialisation" if name == "stored" else name) in message.partition(".")[0]
        assert found["seconds"] < 10
        assert found["adapter_as_before"]


@pytest.mark.parametrize("name", ["FSDP1", "tensor parallelism"])
def test_models_that_leave_no_whole_layer_are_refused(launched, name):
    for process in range(2):
        found = result(launched, name, process)
        assert found["message"].startswith("UnsupportedSetupError")
        assert name in found["message"]
