"""scripts/run_clm.py on two processes, started as users start it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from harness import LINEAR_LAYERS, make_learnable_samples, make_tokenizer
from launching import TORCHRUN, run
from safetensors.torch import load_file

pytestmark = pytest.mark.multi_rank

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "run_clm.py")
ON_CPU = str(ROOT / "tests" / "distributed" / "on_cpu.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--main_process_port", "0"]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")


def config(name):
    return str(ROOT / "scripts" / name)


def deepspeed_launcher():
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher) if launcher.exists() else shutil.which("deepspeed") or "deepspeed", "--num_gpus", "2"]


LAUNCHERS = {
    "torchrun": lambda: [*TORCHRUN, SCRIPT],
    "accelerate, DDP": lambda: [*ACCELERATE, "--config_file", config("accelerate/ddp.yaml"), SCRIPT],
    "accelerate, FSDP2": lambda: [*ACCELERATE, "--config_file", config("accelerate/fsdp2.yaml"), ON_CPU, SCRIPT],
    "accelerate, ZeRO-3": lambda: [*ACCELERATE, "--config_file", config("accelerate/zero3.yaml"), ON_CPU, SCRIPT],
    "deepspeed, ZeRO-2": lambda: [
        *(*deepspeed_launcher(), ON_CPU, SCRIPT),
        *("--deepspeed", config("deepspeed/zero2.json")),
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [" ".join(f"w{token}" for token in sample["input_ids"]) for sample in make_learnable_samples(80)]
    (folder / "train.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=needs_deepspeed if "ZeRO" in name else ()) for name in LAUNCHERS]
)
def test_the_script_runs_under_every_launcher(inputs, tmp_path, launcher):
    flags = {
        "model_name_or_path": inputs / "model",
        "train_file": inputs / "train.txt",
        "output_dir": tmp_path / "output",
        "block_size": 16,
        "da_num_samples": 7,
        "da_batch_size": 3,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "ddp_find_unused_parameters": False,
    }
    flags = [f"--{name}={value}" for name, value in flags.items()]
    output, _, _ = run(
        [*LAUNCHERS[launcher](), "--do_train", "--use_cpu", *flags],
        DS_ACCELERATOR="cpu",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )
    state = tmp_path / "output" / "trainer_state.json"
    if not state.is_file():
        pytest.fail(output[-4000:])
    log = json.loads(state.read_text())["log_history"]
    assert log[0]["lora_da_layers"] == LINEAR_LAYERS
    assert len([entry for entry in log if "loss" in entry]) == 2
    start = load_file(tmp_path / "output" / "lora_da" / "adapter_model.safetensors")
    end = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert set(start) == set(end)
    assert all(torch.isfinite(end[name]).all() and not torch.equal(end[name], start[name]) for name in start)
