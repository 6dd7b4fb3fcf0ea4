"""Two gloo processes under DDP, DeepSpeed ZeRO-1, 2 and 3, and FSDP2, against one process without any of them."""

import importlib.util
import math
import shutil

import numpy as np
import pytest
import torch
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    collate_classes,
    initialize,
    make_config,
    stored_statistics,
    written_adapter,
)
from launching import TESTS, TORCHRUN, launch, result, run
from oracles import dense_guidance
from peft import get_peft_model
from strategy_worker import (
    CHECKPOINTING,
    PARTITIONED,
    STRATEGIES,
    cells,
    classes,
    da_config,
    load_base,
    lora_config,
    make_base,
    make_classifier,
    others,
    samples,
)

from lora_da_hf import load_init

pytestmark = pytest.mark.multi_rank

TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
TINY = 2e-9
"""By how much, of a layer's norm, a training step of 1e-12 may move its weights: 1.07e-9 was seen."""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel"}


def params(strategies, names=lambda strategy: [None]):
    """Return the cases of each strategy, which one worker of pytest gets together, so that it launches them once."""

    def marks(strategy):
        return [pytest.mark.xdist_group(strategy), *([needs_deepspeed] if "zero" in strategy else [])]

    return [
        pytest.param(*([strategy] if name is None else [strategy, name]), marks=marks(strategy))
        for strategy in strategies
        for name in names(strategy)
    ]


every_strategy = pytest.mark.parametrize("strategy", params(STRATEGIES))
every_cell = pytest.mark.parametrize(("strategy", "cell"), params(STRATEGIES, cells))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return a function that gives the folder of a strategy, launched once for all its cells."""
    folders = {}

    def folder_of(strategy):
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy)
            launch("strategy_worker.py", [strategy], folders[strategy])
        return folders[strategy]

    return folder_of


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return a function that gives report and folder of the same initialisation in this process, made once."""
    made = {}

    def single(found, dtype, **settings):
        config = make_config(**{**found["config"], "freeze_a": False, "memory_budget": None})
        key = (config.num_samples, config.batch_size, config.step_size, config.start, dtype, *settings)
        if key not in made:
            folder = tmp_path_factory.mktemp("single") / "init"
            model = get_peft_model(make_base(dtype), lora_config())
            given = iter(samples()) if "population_size" in settings else samples()
            made[key] = initialize(model, given, folder, config=config, **settings), folder
        return made[key]

    return single


@every_cell
def test_a_cell_gives_what_one_process_gives_on_the_union(launched, one_process, strategy, cell):
    folder, dtype = launched(strategy), cell.rsplit("_", 1)[1]
    found = result(folder, cell, 0)["report"]
    report, single = one_process(found, dtype)
    assert len(found["layers"]) == LINEAR_LAYERS
    for key in ("num_samples", "population_size", "kept", "notes", "data_fingerprint", "loss_reduction"):
        assert found[key] == getattr(report, key)
    statistics, expected = stored_statistics(folder / cell / "lora_da"), stored_statistics(single)
    assert_statistics_equal(statistics, expected, TOLERANCES[dtype])
    stored, best = load_init(folder / cell / "lora_da"), load_init(single)
    assert stored.manifest.base_model.weights_sha256 == best.manifest.base_model.weights_sha256
    for name, layer in expected.items():  # the bases reach the same objective
        matrix = dense_guidance(layer, make_config(**found["config"]), report.population_size)
        reached = [np.trace((a := init.bases[name].basis_A.double().numpy()) @ matrix @ a.T) for init in (stored, best)]
        assert reached[0] == pytest.approx(reached[1], rel=TOLERANCES[dtype])
        values = [init.bases[name].eigenvalues.numpy() for init in (stored, best)]  # of the start's own matrix
        np.testing.assert_allclose(*values, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * abs(values[1]).max())


@every_cell
def test_what_a_cell_writes_is_trained_on_as_if_it_was_loaded_from_disk(launched, strategy, cell):
    for process in range(2):
        found = result(launched(strategy), cell, process)
        assert found["wrapped"] == WRAPPED.get(strategy, "DeepSpeedEngine")
        assert found["in_parts"] == (strategy in PARTITIONED)
        assert found["loaded_in_parts"] == (cell == "zero_init_fp32")
        assert (found["report"]["step_size"] > 0) == (cell != "inputs_fp32")
        assert found["left_behind"] == []
        if cell != "inputs_fp32":  # where B is zero, and any step is infinitely larger
            assert max(found["weights"], found["masters"]) <= TINY
        assert len(found["grads"]) == 2
        assert max(found["grads"]) <= TOLERANCES[cell.rsplit("_", 1)[1]]
        assert ("one pass" in found["report"]["plan"]) != cell.startswith("windows")


@every_strategy
def test_a_new_head_is_fitted_as_in_one_process(launched, tmp_path, strategy):
    model = get_peft_model(make_classifier(), lora_config(task_type="SEQ_CLS"))
    report = initialize(model, classes(), tmp_path / "init", collator=collate_classes, config=da_config())
    found = result(launched(strategy), "head", 0)["report"]
    assert [note.split(":")[0] for note in found["notes"]] == [note.split(":")[0] for note in report.notes]
    assert "score was fitted first" in found["notes"][0]
    name = "base_model.model.score.weight"
    theirs = written_adapter(launched(strategy) / "head" / "lora_da")[name]
    torch.testing.assert_close(theirs, written_adapter(tmp_path / "init")[name], rtol=1e-3, atol=1e-5)


@pytest.mark.xdist_group("fsdp2")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_fsdp2_in_bf16_finds_the_step_of_one_process(launched, one_process, checkpointing):
    for process in range(2):
        found = result(launched("fsdp2"), f"{checkpointing}_bf16", process)["report"]
        report, _ = one_process(found, "bf16")
        assert found["search_loss_before"] == pytest.approx(report.search_loss_before, rel=1e-3)
        assert abs(math.log10(found["step_size"] / report.step_size)) <= 0.5  # the grid's ratio


@pytest.mark.parametrize(
    ("strategy", "cell"), params(STRATEGIES, lambda strategy: [name for name in others(strategy) if name != "head"])
)
def test_what_else_a_strategy_can_do_starts_from_what_was_written(launched, strategy, cell):
    for process in range(2):
        found = result(launched(strategy), cell, process)
        assert found["wrapped"] == WRAPPED.get(strategy, "DeepSpeedEngine")
        assert len(found["report"]["layers"]) == LINEAR_LAYERS
        assert found["report"]["num_samples"] == 7
        assert found["initializations"] == 1
        assert found["start"] <= TINY
        if cell != "frozen":
            assert max(found["weights"], found["masters"]) <= TINY


@every_strategy
def test_a_second_start_finds_what_the_first_one_made(launched, tmp_path, strategy):
    for process in range(2):
        assert result(launched(strategy), "again", process)["report"]["notes"][-1].startswith("reusing")
    folder = shutil.copytree(launched(strategy) / "plain_fp32" / "lora_da", tmp_path / "init")
    model = get_peft_model(make_base(), lora_config())
    report = initialize(model, samples(), folder, config=da_config())  # and so does one process
    assert report.notes[-1].startswith("reusing")
    assert_same_tensors(adapter_weights(model), written_adapter(folder))


@every_strategy
def test_a_resumed_run_keeps_the_checkpoints_adapter(launched, strategy):
    for process in range(2):
        found = result(launched(strategy), "resume", process)
        assert found == {"steps": 2, "start": 0.0, "layers_recalled": LINEAR_LAYERS, "untouched": True}


@pytest.mark.xdist_group("ddp")
def test_under_ddp_a_stream_is_read_from_its_head(launched, one_process):
    found = [result(launched("ddp"), "stream", process)["report"] for process in range(2)]
    report, single = one_process(found[0], "fp32", population_size=found[0]["population_size"])
    assert found[0]["data_fingerprint"] == found[1]["data_fingerprint"] == report.data_fingerprint
    statistics = stored_statistics(launched("ddp") / "stream" / "lora_da")
    assert_statistics_equal(statistics, stored_statistics(single), TOLERANCES["fp32"])


@pytest.mark.xdist_group("ddp")
def test_under_ddp_a_smaller_batch_and_a_frozen_a_are_trained_on(launched):
    for process in range(2):
        assert result(launched("ddp"), "greedy", process)["batch_size"] <= 2
        frozen = result(launched("ddp"), "frozen", process)
        assert frozen["trained"]
        assert all("lora_B" in name for name in frozen["trained"])
        assert frozen["weights"] > TINY


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strategy", params([name for name in STRATEGIES if name not in PARTITIONED]))
def test_a_base_in_4_bit_gives_the_statistics_of_one_process(launched, tmp_path, strategy):
    model = get_peft_model(load_base(launched(strategy), "quantised"), lora_config())
    initialize(model, samples(), tmp_path / "init", config=da_config())
    statistics = stored_statistics(launched(strategy) / "quantised" / "lora_da")
    assert_statistics_equal(statistics, stored_statistics(tmp_path / "init"), TOLERANCES["fp32"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_that_is_nan_on_one_process_ends_both(tmp_path, strategy):
    script = str(TESTS / "distributed" / "strategy_worker.py")
    output, status, seconds = run([*TORCHRUN, script, strategy, "fail", str(tmp_path)])
    assert status != 0
    assert seconds < 120
    assert "NonFiniteError" in output
    assert not list(tmp_path.glob("trained.*"))
