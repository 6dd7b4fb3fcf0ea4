"""Training from a stored initialisation."""

import dataclasses
import shutil
import sys
from types import SimpleNamespace

import pytest
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    make_lora_config,
    make_tokenizer,
    make_trainer,
    train_from,
)
from huggingface_hub import ModelCard
from transformers import Trainer

import lora_da_hf.training.callback
from lora_da_hf import LoRADACallback, apply_init
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ConfigError, HubError
from lora_da_hf.training.callback import find_init

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def applied(lora_model, init, **settings):
    model = lora_model(r=4)
    apply_init(model, init, progress=False, **settings)
    return adapter_weights(model)


@pytest.fixture
def no_pass(monkeypatch):
    """Fail on anything that computes an initialisation."""

    def fails(*args, **kwargs):
        raise AssertionError("an initialisation was computed")

    monkeypatch.setattr(lora_da_hf.training.callback, "initialize_lora_da", fails)


@pytest.fixture
def pulls(monkeypatch, stored_init):
    """Stand in for the Hub, and list what was pulled."""
    calls = []

    def pull_init(repo_id, *, revision, statistics):
        assert not statistics
        calls.append((repo_id, revision))
        return dataclasses.replace(load_init(stored_init), source=f"{repo_id}@c0ffee")

    monkeypatch.setitem(sys.modules, "lora_da_hf.hub", SimpleNamespace(pull_init=pull_init))
    return calls


def test_training_starts_from_the_stored_initialisation(tmp_path, stored_init, lora_model, tiny_llama, no_pass):
    settings = {"peft_config": make_lora_config(r=4), "init_from": stored_init}
    trainer = make_trainer(tmp_path, tiny_llama(), arguments={"max_steps": 2}, **settings)
    assert_same_tensors(train_from(trainer).weights, applied(lora_model, stored_init))
    report = trainer.lora_da_report
    assert report.init_from.startswith("sha256:")
    assert len(report.layers) == LINEAR_LAYERS
    logged = [entry for entry in trainer.state.log_history if "lora_da_step_size" in entry]
    assert [(entry["step"], entry["lora_da_step_size"]) for entry in logged] == [(0, report.step_size)]
    assert not (tmp_path / "lora_da").exists()
    assert str(stored_init) not in (tmp_path / "lora_da_init_from.json").read_text()


def test_each_model_of_model_init_starts_there(tmp_path, stored_init, lora_model, no_pass):
    still = {"learning_rate": 0.0}
    trainer = make_trainer(tmp_path, None, arguments=still, init_from=stored_init, model_init=lambda: lora_model(r=4))
    for _ in range(2):
        trainer.train()
        assert_same_tensors(adapter_weights(trainer.model), applied(lora_model, stored_init))


def test_a_resumed_run_is_left_alone_and_needs_no_initialisation(tmp_path, stored_init, lora_model):
    folder = shutil.copytree(stored_init, tmp_path / "lora_da")  # where a run of its own would have put it
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = make_trainer(tmp_path, lora_model(r=4), arguments=SAVING, init_from=folder)
    whole.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    resumed = make_trainer(tmp_path, lora_model(r=4), arguments=SAVING, init_from=folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_tensors(adapter_weights(resumed.model), adapter_weights(whole.model))
    assert resumed.lora_da_report.init_from == whole.lora_da_report.init_from


# The step


def test_the_step_can_be_searched_on_the_training_data_with_the_trainers_loss(
    tmp_path, stored_init, lora_model, no_pass
):
    reports = []
    for smoothing in (0.0, 0.4):
        settings = {"arguments": {"label_smoothing_factor": smoothing}, "init_from": stored_init, "search_step": True}
        folder = tmp_path / str(smoothing)
        trainer = make_trainer(folder, lora_model(r=4), processing_class=make_tokenizer(), **settings)
        trainer.train()
        reports.append(trainer.lora_da_report)
    for report in reports:
        assert report.search_loss_after < report.search_loss_before
        assert report.step_size in dict(report.search)
    assert reports[0].search_loss_before != pytest.approx(reports[1].search_loss_before, rel=1e-2)


# What it is called


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("someone/init@refs/pr/2", ("someone/init", "refs/pr/2")),
        ("someone/my.init_2", ("someone/my.init_2", None)),
    ],
)
def test_a_name_that_is_no_folder_is_pulled(tmp_path, lora_model, pulls, name, call):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=name)
    trainer.train()
    assert pulls == [call]
    assert trainer.lora_da_report.init_from == f"{call[0]}@c0ffee"


def test_a_folder_of_that_name_comes_first(tmp_path, stored_init, lora_model, pulls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stored_init, tmp_path / "someone" / "init@v1.0")
    make_trainer(tmp_path / "out", lora_model(r=4), init_from="someone/init@v1.0").train()
    assert pulls == []


@pytest.mark.parametrize("name", ["init", "./my-init", "a/b/c", "/nowhere/init", "some one/init"])
def test_a_name_that_is_neither_is_an_error(name):
    with pytest.raises(ConfigError, match="neither a folder that exists nor user/repo@revision"):
        find_init(name)


def test_a_misspelt_folder_with_a_slash_is_called_one(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no folder 'outputs/my-int'"):
        find_init("outputs/my-int")


@pytest.mark.parametrize("with_callback", [False, True])
def test_every_card_cites_the_repository_and_commit(tmp_path, lora_model, pulls, with_callback):
    def make():
        start = {"init_from": "someone/init@v1.0"}
        settings = {"kind": Trainer, "callbacks": [LoRADACallback(**start)]} if with_callback else start
        return make_trainer(tmp_path, lora_model(r=4), arguments=SAVING, **settings)

    def tags_of(trainer):
        trainer.save_model()  # as push_to_hub does first
        trainer.create_model_card(model_name="tuned")
        return ModelCard.load(f"{tmp_path}/README.md").data.tags

    trainer, resumed = make(), make()
    trainer.train()
    assert "lora_da_init:someone/init@c0ffee" in tags_of(trainer)
    assert "lora_da_init:someone/init@c0ffee" in ModelCard.load(f"{tmp_path}/checkpoint-1/README.md").data.tags
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    assert "lora_da_init:someone/init@c0ffee" in tags_of(resumed)
    assert len(pulls) == 1
