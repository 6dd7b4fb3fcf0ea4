"""Runs that split a sample or a layer between processes, which are refused."""

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from harness import LINEAR_LAYERS, collate, make_args, make_config, make_learnable_samples
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Trainer

from lora_da_hf import LoRADACallback, initialize_lora_da
from lora_da_hf.errors import UnsupportedSetupError


@pytest.fixture
def trainer(tmp_path, lora_model):
    return Trainer(
        model=lora_model(),
        args=make_args(tmp_path),
        train_dataset=make_learnable_samples(12),
        data_collator=collate,
        callbacks=[LoRADACallback(make_config())],
    )


def begin(trainer, loader=None):
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LoRADACallback))
    given = {"model": trainer.model, "train_dataloader": loader}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, **given)
    return callback.report


@pytest.mark.parametrize(("size", "kind"), [("tp", "tensor"), ("cp", "context"), ("sp", "sequence")])
def test_other_kinds_of_parallelism_are_refused(trainer, size, kind):
    trainer.args.parallelism_config = ParallelismConfig(**{f"{size}_size": 2})
    with pytest.raises(UnsupportedSetupError, match=f"{kind} parallelism"):
        begin(trainer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"bf16": {"enabled": True}}, "Use stage 1"),
        ({"fp16": {"enabled": True}, "zero_optimization": {}}, "Use stage 1"),
    ],
)
def test_what_a_deepspeed_config_may_not_ask_for_is_refused(trainer, monkeypatch, config, message):
    plugin = SimpleNamespace(deepspeed_config=config)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda state: plugin))
    with pytest.raises(UnsupportedSetupError, match=message):
        begin(trainer)


def test_megatron_is_refused(trainer, monkeypatch):
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(UnsupportedSetupError, match="does not work under Megatron-LM"):
        begin(trainer)


def test_parallelism_of_the_data_alone_is_not_refused(trainer):
    trainer.args.parallelism_config = SimpleNamespace(tp_size=1, cp_size=None, sp_size=1, dp_shard_size=2)
    assert len(begin(trainer, trainer.get_train_dataloader()).layers) == LINEAR_LAYERS


class PipelineModule(nn.Module):
    """Has the name of DeepSpeed's."""


def checkpointed_by_fsdp(model):
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "part", PipelineModule()), "pipeline parallelism"),
        (checkpointed_by_fsdp, "FSDP.s own activation checkpointing"),
    ],
)
def test_models_that_are_split_are_refused(lora_model, change, message):
    model = lora_model()
    change(model)
    with pytest.raises(UnsupportedSetupError, match=message):
        initialize_lora_da(model, make_learnable_samples(12), progress=False)
