import dataclasses
import shutil
import sys
from types import SimpleNamespace

import pytest
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    collate,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_tokenizer,
)
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback

import lora_da_hf.training.callback
from lora_da_hf import LoRADACallback, LoRADAConfig, LoRADATrainer, apply_init
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import BaseModelMismatchError, ConfigError, HubError
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.training.init_source import find_init


class KeepStart(TrainerCallback):
    """Keeps the adapter as the first step finds it."""

    start = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.start is None:
            self.start = adapter_weights(model)


def make_trainer(output_dir, model, *, arguments=None, callbacks=(), **settings):
    return LoRADATrainer(
        model=model,
        args=make_args(output_dir, **(arguments or {})),
        train_dataset=make_learnable_samples(24),
        data_collator=collate,
        callbacks=list(callbacks),
        **settings,
    )


def applied(lora_model, init, **settings):
    model = lora_model(r=4)
    apply_init(model, init, **settings)
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

    def pull_init(repo_id, *, revision, statistics, base_model):
        assert not statistics
        calls.append((repo_id, revision, base_model))
        return dataclasses.replace(load_init(stored_init), source=f"{repo_id}@c0ffee")

    monkeypatch.setitem(sys.modules, "lora_da_hf.hub", SimpleNamespace(pull_init=pull_init))
    return calls


# Where training starts


def test_training_starts_from_the_stored_initialisation(tmp_path, stored_init, lora_model, tiny_llama, no_pass):
    keep = KeepStart()
    settings = {"peft_config": make_lora_config(r=4), "init_from": stored_init, "callbacks": [keep]}
    trainer = make_trainer(tmp_path / "out", tiny_llama(), arguments={"max_steps": 2}, **settings)
    trainer.train()
    assert_same_tensors(keep.start, applied(lora_model, stored_init))
    report = trainer.lora_da_report
    assert report.init_from == load_init(stored_init).manifest.digest
    assert report.artifact == str(stored_init)
    assert len(report.layers) == LINEAR_LAYERS
    logged = [entry for entry in trainer.state.log_history if "lora_da_step_size" in entry]
    assert [(entry["step"], entry["lora_da_step_size"]) for entry in logged] == [(0, report.step_size)]
    assert [path.name for path in (tmp_path / "out" / "lora_da").iterdir()] == ["lora_da_report.json"]
    assert str(stored_init) not in (tmp_path / "out" / "lora_da" / "lora_da_report.json").read_text()


def test_an_initialisation_in_the_output_folder_is_kept(tmp_path, stored_init, lora_model, no_pass):
    folder = shutil.copytree(stored_init, tmp_path / "lora_da")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, lora_model(r=4), arguments=arguments, init_from=folder)
    trainer.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    resumed = make_trainer(tmp_path, lora_model(r=4), arguments=arguments, init_from=folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.lora_da_report.init_from == trainer.lora_da_report.init_from


def test_other_files_where_the_report_goes_are_not_lost(tmp_path, stored_init, lora_model, no_pass):
    (tmp_path / "lora_da").mkdir()
    (tmp_path / "lora_da" / "notes.txt").write_text("mine")
    model = lora_model(r=4)
    before = adapter_weights(model)
    with pytest.raises(ConfigError, match=r"holds something else than an initialisation \(notes.txt\)"):
        make_trainer(tmp_path, model, init_from=stored_init).train()
    assert (tmp_path / "lora_da" / "notes.txt").read_text() == "mine"
    assert_same_tensors(adapter_weights(model), before)


def test_the_callback_does_the_same_in_any_trainer(tmp_path, stored_init, lora_model, no_pass):
    keep, callback = KeepStart(), LoRADACallback(init_from=str(stored_init))
    trainer = Trainer(
        model=lora_model(r=4),
        args=make_args(tmp_path),
        train_dataset=make_learnable_samples(24),
        data_collator=collate,
        callbacks=[callback, keep],
    )
    trainer.train()
    assert_same_tensors(keep.start, applied(lora_model, stored_init))
    assert any("lora_da_step_size" in entry for entry in trainer.state.log_history)


def test_a_model_from_model_init_starts_there_each_time(tmp_path, stored_init, lora_model, no_pass):
    trainer = make_trainer(
        tmp_path, None, arguments={"learning_rate": 0.0}, init_from=stored_init, model_init=lambda: lora_model(r=4)
    )
    for _ in range(2):
        trainer.train()
        assert_same_tensors(adapter_weights(trainer.model), applied(lora_model, stored_init))


def test_a_second_training_goes_on_from_the_first(tmp_path, stored_init, lora_model):
    trainer = make_trainer(tmp_path, lora_model(r=4), arguments={"learning_rate": 0.0}, init_from=stored_init)
    trainer.train()
    report = trainer.lora_da_report
    trainer.train()
    assert trainer.lora_da_report is report


def test_a_resumed_run_is_left_alone_and_needs_no_initialisation(tmp_path, stored_init, lora_model):
    folder = shutil.copytree(stored_init, tmp_path / "init")
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "out", lora_model(r=4), arguments=arguments, init_from=folder)
    whole.train()
    shutil.rmtree(folder)
    resumed = make_trainer(tmp_path / "out", lora_model(r=4), arguments=arguments, init_from=folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same_tensors(adapter_weights(resumed.model), adapter_weights(whole.model))
    assert resumed.lora_da_report.to_dict() == {**whole.lora_da_report.to_dict(), "artifact": None}


def test_a_frozen_stays_frozen_while_b_is_trained(tmp_path, stored_init, lora_model):
    keep = KeepStart()
    trainer = make_trainer(
        tmp_path, lora_model(r=4), da_config=LoRADAConfig(freeze_a=True), init_from=stored_init, callbacks=[keep]
    )
    trainer.train()
    end = adapter_weights(trainer.model)
    assert {name for name in end if (end[name] != keep.start[name]).any()} == {n for n in end if "lora_B" in n}
    assert_same_tensors(keep.start, applied(lora_model, stored_init))


# The step


def test_the_step_can_be_searched_on_the_training_data(tmp_path, stored_init, lora_model, no_pass):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=stored_init, search_step=True)
    trainer.train()
    report = trainer.lora_da_report
    assert report.search_loss_after < report.search_loss_before
    assert report.step_size in dict(report.search)
    assert (report.num_samples, report.num_search_samples) == (12, 3)
    assert report.init_from.startswith("sha256:")


def test_the_searched_loss_is_the_trainer_s(tmp_path, stored_init, lora_model):
    reports = []
    for smoothing in (0.0, 0.4):
        arguments = {"label_smoothing_factor": smoothing}
        trainer = make_trainer(
            tmp_path / str(smoothing),
            lora_model(r=4),
            arguments=arguments,
            init_from=stored_init,
            search_step=True,
            processing_class=make_tokenizer(),
        )
        trainer.train()
        reports.append(trainer.lora_da_report)
    assert reports[0].search_loss_before != pytest.approx(reports[1].search_loss_before, rel=1e-2)


def test_a_step_that_the_settings_give_is_used(tmp_path, stored_init, lora_model):
    keep = KeepStart()
    settings = {"da_config": LoRADAConfig(step_size=0.01), "callbacks": [keep]}
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=stored_init, **settings)
    trainer.train()
    assert trainer.lora_da_report.step_size == 0.01
    assert_same_tensors(keep.start, applied(lora_model, stored_init, step_size=0.01))


def test_searching_without_an_initialisation_is_an_error():
    with pytest.raises(ConfigError, match="search_step needs init_from"):
        LoRADACallback(search_step=True)


# What it is called


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("someone/init@v1.0", ("someone/init", "v1.0")),
        ("someone/init@refs/pr/2", ("someone/init", "refs/pr/2")),
        ("someone/my.init_2", ("someone/my.init_2", None)),
    ],
)
def test_a_name_that_is_no_folder_is_pulled(tmp_path, lora_model, pulls, name, call):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=name)
    trainer.train()
    assert pulls == [(*call, base_model_facts(trainer.model))]
    assert trainer.lora_da_report.init_from == f"{call[0]}@c0ffee"


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_to_be_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"init_from='./my-init' is neither a folder that exists nor user/repo"):
        find_init("./my-init", None)

    def fails(*args, **kwargs):
        raise HubError("Pulling outputs/my-init failed: there is no such repo.")

    monkeypatch.setattr("lora_da_hf.hub.pull_init", fails)
    with pytest.raises(HubError, match=f"no such repo. There is no folder outputs/my-init in {tmp_path} either"):
        find_init("outputs/my-init", None)


def test_a_folder_of_that_name_comes_first(tmp_path, stored_init, lora_model, pulls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stored_init, tmp_path / "someone" / "init@v1.0")
    trainer = make_trainer(tmp_path / "out", lora_model(r=4), init_from="someone/init@v1.0")
    trainer.train()
    assert pulls == []
    assert trainer.lora_da_report.artifact == "someone/init@v1.0"


@pytest.mark.parametrize("name", ["init", "a/b/c", "/nowhere/init", "someone/init@", "some one/init"])
def test_a_name_that_is_neither_is_an_error(tmp_path, lora_model, name):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=name)
    with pytest.raises(ConfigError, match="is neither a folder that exists nor user/repo@revision"):
        trainer.train()


def test_another_base_is_refused_before_training(tmp_path, stored_init, tiny_llama, lora_model):
    trainer = make_trainer(tmp_path, lora_model(model=tiny_llama(seed=1)), init_from=stored_init)
    with pytest.raises(BaseModelMismatchError, match="its weights have another fingerprint"):
        trainer.train()
    assert trainer.state.global_step == 0


# The card


def card_of(trainer):
    trainer.save_model()  # as push_to_hub does first
    trainer.create_model_card(model_name="tuned")
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_the_card_cites_the_repository_and_commit(tmp_path, lora_model, pulls):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from="someone/init@v1.0")
    trainer.train()
    card = card_of(trainer)
    assert card.data["lora_da_init"] == "someone/init@c0ffee"
    assert card.data["library_name"] == "peft"
    assert card.data["model_name"] == "tuned"
    assert "# tuned" in card.text


def test_the_card_cites_a_folder_by_its_manifest_and_not_by_its_path(tmp_path, stored_init, lora_model):
    trainer = make_trainer(tmp_path, lora_model(r=4), init_from=stored_init)
    trainer.train()
    card = card_of(trainer)
    assert card.data["lora_da_init"] == load_init(stored_init).manifest.digest
    assert str(stored_init) not in str(card)


def test_the_card_of_a_resumed_run_cites_it_too(tmp_path, lora_model, pulls):
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tmp_path, lora_model(r=4), arguments=arguments, init_from="someone/init@v1.0")
    first.train()
    resumed = make_trainer(tmp_path, lora_model(r=4), arguments=arguments, init_from="someone/init@v1.0")
    resumed.train(resume_from_checkpoint=True)
    assert card_of(resumed).data["lora_da_init"] == "someone/init@c0ffee"
    assert len(pulls) == 1


def test_every_card_of_another_trainer_cites_it_in_a_tag(tmp_path, lora_model, pulls):
    def make():
        return Trainer(
            model=lora_model(r=4),
            args=make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
            train_dataset=make_learnable_samples(24),
            data_collator=collate,
            callbacks=[LoRADACallback(init_from="someone/init@v1.0")],
        )

    trainer = make()
    trainer.train()
    assert "lora_da_init:someone/init@c0ffee" in card_of(trainer).data.tags
    saved = ModelCard.load(f"{tmp_path}/checkpoint-1/README.md")
    assert "lora_da_init:someone/init@c0ffee" in saved.data.tags
    resumed = make()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    assert "lora_da_init:someone/init@c0ffee" in card_of(resumed).data.tags


def test_a_card_without_an_initialisation_to_cite_is_trainer_s(tmp_path, lora_model):
    trainer = make_trainer(tmp_path, lora_model(r=4), da_config=make_config())
    trainer.train()
    assert "lora_da_init" not in card_of(trainer).data.to_dict()
    assert load_init(tmp_path / "lora_da").report.init_from is None
