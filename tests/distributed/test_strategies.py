"""Two gloo processes under DDP, DeepSpeed ZeRO-1, 2 and 3, and FSDP2, against one process without any of them."""

import importlib.util
import math
import shutil

import pytest
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    collate,
    make_config,
)
from launching import guidance_of, launch, result, stored_statistics
from peft import get_peft_model
from safetensors.torch import load_file
from strategy_worker import (
    CHECKPOINTING,
    PARTITIONED,
    QUANTISED,
    STRATEGIES,
    cells,
    da_config,
    lora_config,
    make_base,
    quantised_base,
    samples,
)

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.store import load_init

pytestmark = pytest.mark.multi_rank

TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
TINY = 2e-9
"""By how much, of a layer's norm, a training step of 1e-12 may move its weights: 1.07e-9 was seen."""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel"}
EVERY_STRATEGY = [
    pytest.param(strategy, marks=needs_deepspeed if "zero" in strategy else ()) for strategy in STRATEGIES
]
EVERY_PARTITIONED = [param for param in EVERY_STRATEGY if param.values[0] in PARTITIONED]
EVERY_CELL = [
    pytest.param(strategy, cell, marks=needs_deepspeed if "zero" in strategy else ())
    for strategy in STRATEGIES
    for cell in cells(strategy)
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return a function that gives the folder of a strategy, launched once for all its cells."""
    folders = {}

    def folder_of(strategy):
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy)
            launch("strategy_worker.py", [strategy], folders[strategy], DS_ACCELERATOR="cpu")
        return folders[strategy]

    return folder_of


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return a function that gives report and folder of the same initialisation in this process, made once."""
    made = {}

    def initialize(config, dtype):
        key = (config["num_samples"], config["batch_size"], config["step_size"], dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("single")
            report = initialize_lora_da(
                get_peft_model(make_base(dtype), lora_config()),
                samples(),
                config=make_config(**config),
                data_collator=collate,
                output_dir=folder / "init",
                progress=False,
            )
            made[key] = report, folder / "init"
        return made[key]

    return initialize


@pytest.mark.parametrize(("strategy", "cell"), EVERY_CELL)
def test_statistics_and_objective_are_those_of_one_process_on_the_union(launched, one_process, strategy, cell):
    folder, dtype = launched(strategy), cell.rsplit("_", 1)[1]
    found = result(folder, cell, 0)["report"]
    report, single = one_process(found["config"], dtype)
    assert len(found["layers"]) == LINEAR_LAYERS
    assert found["data_fingerprint"] == report.data_fingerprint
    for key in ("num_samples", "population_size", "kept", "notes"):
        assert found[key] == getattr(report, key)
    statistics, expected = stored_statistics(folder / cell / "lora_da"), stored_statistics(single)
    assert_statistics_equal(statistics, expected, TOLERANCES[dtype])
    bases, best = load_init(folder / cell / "lora_da").bases, load_init(single).bases
    for name, layer in expected.items():
        objective = guidance_of(layer, name, make_config(**found["config"]), report)
        assert objective(bases[name].basis_A) == pytest.approx(objective(best[name].basis_A), rel=TOLERANCES[dtype])


@pytest.mark.parametrize(("strategy", "cell"), EVERY_CELL)
def test_what_is_written_is_there_after_the_first_step(launched, strategy, cell):
    for rank in range(2):
        found = result(launched(strategy), cell, rank)
        assert found["wrapped"] == WRAPPED.get(strategy, "DeepSpeedEngine")
        assert found["report"]["step_size"] > 0
        assert max(found["weights"], found["masters"]) <= TINY


@pytest.mark.parametrize(("strategy", "cell"), EVERY_CELL)
def test_training_goes_on_as_from_the_same_adapter_loaded_from_disk(launched, strategy, cell):
    for rank in range(2):
        found = result(launched(strategy), cell, rank)
        assert found["left_behind"] == []
        assert len(found["grads"]) == 2
        assert max(found["grads"]) <= TOLERANCES[cell.rsplit("_", 1)[1]]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_fsdp2_in_bf16_finds_the_step_of_one_process(launched, one_process, checkpointing):
    for rank in range(2):
        found = result(launched("fsdp2"), f"{checkpointing}_bf16", rank)["report"]
        report, _ = one_process(found["config"], "bf16")
        assert found["search_loss_before"] == pytest.approx(report.search_loss_before, rel=1e-3)
        assert abs(math.log10(found["step_size"] / report.step_size)) <= 0.5  # the grid's ratio


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_the_base_model_is_the_same_for_all(launched, one_process, strategy):
    folder = launched(strategy)
    for cell in cells(strategy):
        found = load_init(folder / cell / "lora_da").manifest.base_model
        _, single = one_process(result(folder, cell, 0)["report"]["config"], cell.rsplit("_", 1)[1])
        assert found["weights_sha256"] == load_init(single).manifest.base_model.weights_sha256


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_a_second_start_finds_what_the_first_one_made(launched, strategy):
    for rank in range(2):
        found = result(launched(strategy), "again", rank)
        assert found["stages"] == ["load", "probe"]
        assert found["note"].endswith("made before with the same model, adapter, samples and settings")
        assert max(found["weights"], found["masters"]) <= TINY


def test_one_process_finds_what_two_made(launched, tmp_path):
    folder = shutil.copytree(launched("fsdp2") / "plain_fp32" / "lora_da", tmp_path / "init")
    model = get_peft_model(make_base(), lora_config())
    report = initialize_lora_da(
        model, samples(), config=da_config(), data_collator=collate, output_dir=folder, progress=False
    )
    assert report.notes[-1].startswith(f"found in {folder}")
    assert_same_tensors(adapter_weights(model), load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(("strategy", "cell"), EVERY_CELL)
def test_parameters_are_in_parts_where_the_strategy_has_them_so(launched, strategy, cell):
    for rank in range(2):
        found = result(launched(strategy), cell, rank)
        assert found["in_parts"] == (strategy in PARTITIONED)
        assert found["loaded_in_parts"] == (cell == "zero_init_fp32")


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("strategy", EVERY_PARTITIONED)
def test_windows_are_passes_of_all_processes_in_step(launched, strategy, checkpointing):
    for rank in range(2):
        plan = result(launched(strategy), f"windows_{checkpointing}_fp32", rank)["report"]["plan"]
        assert plan.startswith("2 processes that share the samples, ")
        assert "passes, each for a part of the layers" in plan


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_a_resumed_run_keeps_the_checkpoints_adapter(launched, strategy):
    for rank in range(2):
        found = result(launched(strategy), "resume", rank)
        assert found == {"steps": 2, "start": 0.0, "layers_recalled": LINEAR_LAYERS, "untouched": True}


def test_a_stream_gives_the_statistics_of_its_head_under_ddp(launched, one_process):
    for rank in range(2):
        found = result(launched("ddp"), "stream", rank)
        report, single = one_process({**found["config"], "population_size": None}, "fp32")
        assert found["data_fingerprint"] == report.data_fingerprint
        assert found["population_size"] == 31
    statistics = stored_statistics(launched("ddp") / "stream" / "lora_da")
    assert_statistics_equal(statistics, stored_statistics(single), TOLERANCES["fp32"])


def test_a_run_that_starts_over_with_a_smaller_batch_is_initialised_once_under_ddp(launched):
    for rank in range(2):
        found = result(launched("ddp"), "batch_size", rank)
        assert found["batch_size"] <= 2
        assert found["initializations"] == 1
        assert found["weights"] <= 1e-9


@needs_deepspeed
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is an extra")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_trls_sft_trainer_takes_the_callback(launched, strategy):
    for rank in range(2):
        found = result(launched(strategy), "sft", rank)
        assert found["wrapped"] == "DeepSpeedEngine"
        assert len(found["report"]["layers"]) == LINEAR_LAYERS
        assert found["report"]["num_samples"] == 7
        assert max(found["weights"], found["masters"]) <= TINY


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strategy", [param for param in EVERY_STRATEGY if param.values[0] in QUANTISED])
def test_a_base_in_4_bit_gives_the_statistics_of_one_process(launched, tmp_path, strategy):
    for rank in range(2):
        found = result(launched(strategy), "qlora", rank)
        assert found["wrapped"] == WRAPPED.get(strategy, "DeepSpeedEngine")
        assert found["layers"] == LINEAR_LAYERS
        assert max(found["weights"], found["masters"]) <= TINY
    model = get_peft_model(quantised_base(launched(strategy)), lora_config())
    settings = {"config": da_config(), "data_collator": collate, "output_dir": tmp_path / "init", "progress": False}
    initialize_lora_da(model, samples(), **settings)
    statistics = stored_statistics(launched(strategy) / "qlora" / "lora_da")
    assert_statistics_equal(statistics, stored_statistics(tmp_path / "init"), TOLERANCES["fp32"])
