"""Two gloo processes against one. Processes may abort at exit in gloo's teardown: what counts is what they wrote."""

import math
import shutil

import pytest
import worker
from harness import (
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    collate,
    factors,
    relative_error,
)
from launching import guidance_of, launch, result, start_apart, stored_statistics
from safetensors.torch import load_file

from lora_da_hf import apply_init, initialize_lora_da, refit_init
from lora_da_hf.artifacts.store import load_init

pytestmark = pytest.mark.multi_rank


@pytest.fixture(scope="module")
def initialized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initialized")
    launch("worker.py", ["initialize"], folder)
    return folder


@pytest.fixture(scope="module")
def reused(tmp_path_factory, stored_init):
    folder = tmp_path_factory.mktemp("reused")
    for rank in range(2):
        refit_init(stored_init, folder / f"of_rank_{rank}", rank=4 + rank)
    shutil.copytree(stored_init, folder / "stored")
    launch("worker.py", ["reuse"], folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    launch("worker.py", ["train"], folder)
    return folder


def adapter(folder, name, rank):
    return load_file(folder / f"{name}.rank{rank}.safetensors")


def products(weights):
    return {name: weights[name.replace("lora_A", "lora_B")] @ a for name, a in factors(weights, "A").items()}


def assert_products_equal(found, expected, tolerance):
    found, expected = products(found), products(expected)
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


def one_process(folder, lora_model, samples, config):
    model = lora_model()
    report = initialize_lora_da(
        model, samples, config=config, data_collator=collate, output_dir=folder / "single", progress=False
    )
    return report, adapter_weights(model)


def test_statistics_of_uneven_shares_are_those_of_one_process(initialized, tmp_path, lora_model):
    config = worker.seven_config(save_statistics=True)
    report, _ = one_process(tmp_path, lora_model, worker.seven_samples(), config)
    found, expected = stored_statistics(initialized / "stored"), stored_statistics(tmp_path / "single")
    assert_statistics_equal(found, expected, 1e-5)
    counts = [[(s.num_input_tokens, s.num_output_tokens) for s in each.values()] for each in (found, expected)]
    assert counts[0] == counts[1]
    for rank in range(2):
        shared = result(initialized, "shared", rank)
        assert shared["num_samples"] == report.num_samples == 7
        assert shared["step_unit"] == pytest.approx(report.step_unit, rel=1e-5)
        assert shared["data_fingerprint"] == report.data_fingerprint
        assert [layer["num_tokens"] for layer in shared["layers"]] == [layer.num_tokens for layer in report.layers]


def test_the_guidance_objective_is_that_of_one_process(initialized, tmp_path, lora_model):
    config = worker.seven_config(save_statistics=True)
    report, _ = one_process(tmp_path, lora_model, worker.seven_samples(), config)
    statistics = stored_statistics(tmp_path / "single")
    bases = {name: load_init(folder).bases for name, folder in _folders(initialized, tmp_path).items()}
    for layer in report.layers:
        objective = guidance_of(statistics[layer.name], layer.name, config, report)
        best = objective(bases["single"][layer.name].basis_A)
        assert best == pytest.approx(sum(layer.eigenvalues), rel=1e-5)
        for which in ("shared", "stored"):
            assert objective(bases[which][layer.name].basis_A) == pytest.approx(best, rel=1e-5), layer.name


def _folders(initialized, tmp_path):
    return {"shared": initialized / "shared", "stored": initialized / "stored", "single": tmp_path / "single"}


def test_both_processes_have_the_same_adapter_and_it_is_that_of_one(initialized, tmp_path, lora_model):
    _, expected = one_process(tmp_path, lora_model, worker.seven_samples(), worker.seven_config())
    for name in ("shared", "stored"):
        adapters = [adapter(initialized, name, rank) for rank in range(2)]
        assert_same_tensors(adapters[1], adapters[0])
        assert_products_equal(adapters[0], expected, 1e-4)
        assert_same_tensors(adapters[0], load_file(initialized / name / "adapter_model.safetensors"))


def test_a_process_without_any_sample_takes_part(initialized, tmp_path, lora_model):
    config = worker.seven_config(save_statistics=True)
    report, expected = one_process(tmp_path, lora_model, worker.seven_samples()[:1], config)
    assert report.num_samples == 1
    found = stored_statistics(initialized / "one_sample")
    assert_statistics_equal(found, stored_statistics(tmp_path / "single"), 1e-5)
    adapters = [adapter(initialized, "one_sample", rank) for rank in range(2)]
    assert_same_tensors(adapters[1], adapters[0])
    assert_products_equal(adapters[0], expected, 1e-4)


def test_windows_of_processes_that_share_the_samples_have_the_bits_of_one_window(initialized):
    for rank in range(2):
        assert_same_tensors(adapter(initialized, "sample_windows", rank), adapter(initialized, "shared", 0))
    assert "passes, each for a part of the layers" in result(initialized, "sample_windows", 0)["plan"]


# A process that is killed


# What is refused


def test_fsdp1_leaves_no_adapter_matrix_and_is_refused(tmp_path):
    start_apart("worker.py", ["fsdp1"], tmp_path)
    found = [result(tmp_path, "fsdp1", rank) for rank in range(2)]
    for each in found:
        assert each["joined"].startswith("Must flatten tensors with uniform `requires_grad`")  # frozen and trained ones
        assert all(len(shape) == 1 for shape in each["shapes"].values())
        assert each["message"].startswith("UnsupportedSetupError: LoRA-DA does not work with FSDP1, which joins")
        assert each["message"].endswith("Use FSDP2: fsdp_version: 2 in accelerate's config.")
    assert any([0] in each["shapes"].values() for each in found)  # all of it is with the other process


def test_a_model_that_transformers_split_for_tensor_parallelism_is_refused(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "base")
    start_apart("worker.py", ["tensor_parallel"], tmp_path)
    for rank in range(2):
        found = result(tmp_path, "tensor_parallel", rank)
        assert found["shape"] == [40, 48]  # half of the rows
        assert found["message"].startswith("UnsupportedSetupError: LoRA-DA does not work under tensor parallelism")


# What it saves


# The trainer under DDP


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    trainer = worker.make_trainer(folder, "trained")
    trainer.train()
    return trainer, load_file(folder / "trained" / "lora_da" / "adapter_model.safetensors")


def test_training_runs_under_ddp(trained):
    for rank in range(2):
        found = result(trained, "trained", rank)
        assert found["world_size"] == 2
        assert found["wrapped"] == "DistributedDataParallel"


def test_the_report_of_two_processes_is_that_of_one(trained, single):
    expected = single[0].lora_da_report.to_dict()
    loose = {
        "step_size",
        "search_loss_before",
        "search_loss_after",
        "unseen_loss_before",
        "unseen_loss_after",
    }
    exact = {"num_samples", "num_search_samples", "num_unseen_samples", "population_size", "batch_size", "notes"}
    exact |= {"data_fingerprint", "kept", "config", "num_unlabelled", "loss_reduction"}
    for rank in range(2):
        found = result(trained, "trained", rank)["report"]
        assert {key: found[key] for key in exact} == {key: expected[key] for key in exact}
        for key in loose:
            assert math.isclose(found[key], expected[key], rel_tol=1e-3), key
        for mine, theirs in zip(found["layers"], expected["layers"], strict=True):
            assert mine["name"] == theirs["name"]
            assert mine["num_tokens"] == theirs["num_tokens"]
            assert sum(mine["eigenvalues"]) == pytest.approx(sum(theirs["eigenvalues"]), rel=1e-5)
            assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)


def test_training_under_ddp_starts_where_one_process_does(trained, single):
    starts = [adapter(trained, "trained.start", rank) for rank in range(2)]
    assert_same_tensors(starts[1], starts[0])
    assert_products_equal(starts[0], single[1], 1e-3)
    assert_same_tensors(starts[0], load_file(trained / "trained" / "lora_da" / "adapter_model.safetensors"))


def test_training_under_ddp_moves_both_processes_together(trained):
    starts, ends = ([adapter(trained, f"trained.{when}", rank) for rank in range(2)] for when in ("start", "end"))
    assert_same_tensors(ends[1], ends[0])
    assert all((ends[0][name] != starts[0][name]).any() for name in starts[0])
    losses = [entry["loss"] for entry in result(trained, "trained", 0)["log"] if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def test_only_the_main_processs_log_is_printed_but_both_have_the_report(trained):
    for rank in range(2):
        log = result(trained, "trained", rank)["log"]
        assert "lora_da_step_size" in log[0]
        assert log[0]["step"] == 0


def test_a_frozen_a_trains_under_ddp(trained):
    starts, ends = ([adapter(trained, f"frozen.{when}", rank) for rank in range(2)] for when in ("start", "end"))
    assert_same_tensors(ends[1], ends[0])
    assert_same_tensors(factors(ends[0], "A"), factors(starts[0], "A"))
    assert all((ends[0][name] != starts[0][name]).any() for name in factors(starts[0], "B"))
    names = result(trained, "frozen", 0)["optimizer"]
    assert names
    assert all("lora_B" in name for name in names)


# A stored initialisation


def test_both_processes_start_from_a_stored_initialisation_as_one_would(reused, lora_model):
    model = lora_model(r=4)
    report = apply_init(model, reused / "stored")
    for rank in range(2):
        assert_same_tensors(adapter(reused, "reused", rank), adapter_weights(model))
        found = result(reused, "reused", rank)
        assert (found["step_size"], found["init_from"]) == (report.step_size, report.init_from)


def test_both_processes_search_the_step_together(reused, lora_model):
    model = lora_model(r=4)
    samples = worker.trainer_samples()
    report = apply_init(model, reused / "stored", samples=samples, data_collator=collate, batch_size=3, progress=False)
    found = [result(reused, "searched", rank) for rank in range(2)]
    assert found[0]["search"] == found[1]["search"]
    assert found[0]["step_size"] == pytest.approx(report.step_size, rel=1e-4)
    assert found[0]["search_loss_after"] == pytest.approx(report.search_loss_after, rel=1e-5)
    assert_same_tensors(*(adapter(reused, "searched", rank) for rank in range(2)))
    assert_products_equal(adapter(reused, "searched", 0), adapter_weights(model), 1e-4)
