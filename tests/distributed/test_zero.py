"""Two gloo processes under DeepSpeed ZeRO-1, 2 and 3 against one process without it."""

import importlib.util

import pytest
import torch
from conftest import make_lora_model, make_tiny_llama
from harness import LINEAR_LAYERS, assert_statistics_equal, collate, make_config, make_learnable_samples
from launching import guidance_of, launch, result, stored_statistics

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.store import load_init

pytestmark = [
    pytest.mark.multi_rank,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra"),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
CHECKPOINTING = ("plain", "reentrant", "not_reentrant")
CELLS = {
    stage: [
        *(f"{checkpointing}_{dtype}" for dtype in DTYPES for checkpointing in CHECKPOINTING),
        *("one_sample_fp32", "searched_fp32", "offload_bf16"),
        *(("persistent_fp32", "zero_init_fp32") if stage == 3 else ()),
    ]
    for stage in (1, 2, 3)
}
EVERY_CELL = [(stage, cell) for stage, cells in CELLS.items() for cell in cells]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Return a function that gives the folder of a stage, launched once for all its cells."""
    folders = {}

    def folder_of(stage):
        if stage not in folders:
            folders[stage] = tmp_path_factory.mktemp(f"zero{stage}")
            launch("zero_worker.py", [str(stage)], folders[stage], DS_ACCELERATOR="cpu")
        return folders[stage]

    return folder_of


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return a function that gives report and folder of the same initialisation in this process, made once."""
    made = {}

    def initialize(config, dtype):
        key = (config["num_samples"], config["batch_size"], dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("single")
            model = make_tiny_llama(dtype=DTYPES[dtype], intermediate_size=81)
            report = initialize_lora_da(
                make_lora_model(model=model, r=3, lora_alpha=6),
                make_learnable_samples(31),
                config=make_config(**config),
                data_collator=collate,
                output_dir=folder / "init",
                progress=False,
            )
            made[key] = report, folder / "init"
        return made[key]

    return initialize


@pytest.mark.parametrize(("stage", "cell"), EVERY_CELL)
def test_statistics_and_objective_are_those_of_one_process_on_the_union(stages, one_process, stage, cell):
    folder, dtype = stages(stage), cell.rsplit("_", 1)[1]
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
        objective = guidance_of(layer, name, make_config(**found["config"]), report.population_size)
        assert objective(bases[name].basis_A) == pytest.approx(objective(best[name].basis_A), rel=TOLERANCES[dtype])


@pytest.mark.parametrize(("stage", "cell"), EVERY_CELL)
def test_what_is_written_is_there_after_the_first_step(stages, stage, cell):
    for rank in range(2):
        found = result(stages(stage), cell, rank)
        assert found["engine"] == "DeepSpeedEngine"
        assert found["report"]["step_size"] > 0
        # a step of 1e-12 moves float32 entries by that much, and those of bfloat16 not at all
        assert found["weights"] <= (0 if "bf16" in cell else 1e-9)
        assert found["masters"] <= 1e-9


@pytest.mark.parametrize(("stage", "cell"), EVERY_CELL)
def test_training_goes_on_as_from_the_same_adapter_loaded_from_disk(stages, stage, cell):
    for rank in range(2):
        found = result(stages(stage), cell, rank)
        assert found["left_behind"] == []
        assert len(found["grads"]) == 2
        assert max(found["grads"]) <= TOLERANCES[cell.rsplit("_", 1)[1]]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_base_model_is_the_same_for_all(stages, one_process, stage):
    folder = stages(stage)
    for cell in CELLS[stage]:
        found = load_init(folder / cell / "lora_da").manifest.base_model
        _, single = one_process(result(folder, cell, 0)["report"]["config"], cell.rsplit("_", 1)[1])
        assert found["weights_sha256"] == load_init(single).manifest.base_model["weights_sha256"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_that_is_nan_on_one_process_fails_on_both(stages, stage):
    innocent, guilty = (result(stages(stage), "nan_on_one_process", rank) for rank in range(2))
    assert guilty.startswith("NonFiniteError: The loss of a batch is nan")
    assert innocent == f"PeerFailed: Process 1 failed in the statistics pass: {guilty}"


def test_a_failure_in_the_middle_of_a_pass_ends_the_run(stages):
    message = result(stages(3), "broken_on_one_process", 1)
    assert message.startswith(
        "OutOfStepError: Process 1 failed in the statistics pass: ValueError: broken on purpose. The parameters are "
        "partitioned, so the other processes wait"
    )
