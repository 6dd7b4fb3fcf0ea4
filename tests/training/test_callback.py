"""The callback in a trainer that knows nothing of it."""

import dataclasses

import pytest
from datasets import Dataset
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    collate,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    written_adapter,
)
from peft import get_peft_model
from transformers import HfArgumentParser, Trainer, TrainerCallback

from lora_da_hf import LoRADACallback, LoRADAConfig, LoRADATrainer, load_init
from lora_da_hf.errors import ConfigError, UnsupportedSetupError
from lora_da_hf.samples import pad_samples
from lora_da_hf.training.arguments import LoRADAArguments


def make_trainer(folder, model, samples, callback=None, **arguments):
    callbacks = [callback] if callback else []
    return Trainer(model, make_args(folder, **arguments), collate, samples, callbacks=callbacks)


@pytest.mark.parametrize("attached", [False, True])
def test_a_plain_trainer_with_the_callback_does_what_our_trainer_does(tmp_path, lora_model, samples, capsys, attached):
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path / "a", lora_model(), samples, None if attached else callback, max_steps=2)
    if attached:
        assert callback.attach(trainer) is callback
    trainer.train()
    settings = {"train_dataset": samples, "data_collator": collate, "da_config": make_config()}
    ours = LoRADATrainer(lora_model(), make_args(tmp_path / "b", max_steps=2), **settings)
    ours.train()
    assert_same_tensors(written_adapter(tmp_path / "a" / "lora_da"), written_adapter(tmp_path / "b" / "lora_da"))
    assert_same_tensors(adapter_weights(trainer.model), adapter_weights(ours.model))
    report = callback.report
    assert (len(report.layers), report.batch_size, report.population_size) == (LINEAR_LAYERS, 4, len(samples))
    (entry,) = [entry for entry in trainer.state.log_history if "lora_da_step_size" in entry]
    assert (entry["step"], entry["lora_da_step_size"]) == (0, report.step_size)
    line = f"LoRA-DA: held-out loss {report.unseen_loss_before:.4f} -> {report.unseen_loss_after:.4f} in "
    assert line in capsys.readouterr().out


def test_an_attached_callback_reaches_every_logger(tmp_path, lora_model, samples):
    class Logger(TrainerCallback):
        """As those of TensorBoard, W&B and others are."""

        logged = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logged = (*self.logged, logs)

    trainer, other = make_trainer(tmp_path, lora_model(), samples), Logger()
    trainer.add_callback(other)
    callback = LoRADACallback(make_config()).attach(trainer)
    trainer.train()
    assert other.logged[0]["lora_da_step_size"] == callback.report.step_size
    assert other.logged[0]["lora_da_unseen_loss_after"] == callback.report.unseen_loss_after


@pytest.mark.parametrize("attached", [False, True])
def test_a_stored_start_is_measured_or_says_what_its_author_found(
    tmp_path, stored_init, lora_model, samples, attached, capfd, caplog
):
    callback = LoRADACallback(init_from=stored_init)
    trainer = make_trainer(tmp_path, lora_model(r=4), samples, None if attached else callback, disable_tqdm=False)
    if attached:
        callback.attach(trainer)
    trainer.train()
    report, stored = callback.report, load_init(stored_init).report
    assert (report.unseen_loss_after is not None) is attached
    assert any(f"to {stored.unseen_loss_after:.4f}" in note for note in report.notes) is not attached
    out, err = capfd.readouterr()
    told = err + caplog.text  # which of the two takes it depends on the level of the log
    assert ("LoRA-DA: its author's held-out loss" in told) is not attached
    assert f"(from {stored_init}, step" in out


@pytest.mark.parametrize(("name", "value"), [("label_smoothing_factor", 0.3), ("loss_type", "sigmoid")])
def test_a_loss_that_a_callback_cannot_see_is_a_warning_unless_it_is_attached(
    tmp_path, lora_model, samples, caplog, name, value
):
    for attached in (False, True):
        caplog.clear()
        callback = LoRADACallback(make_config())
        trainer = make_trainer(tmp_path / str(attached), lora_model(), samples, callback)
        setattr(trainer.args, name, value)
        if attached:
            callback.attach(trainer)
        trainer.train()
        assert ("Call callback.attach(trainer)" in caplog.text) is not attached


def test_a_data_set_and_a_collator_that_are_given_are_used(tmp_path, lora_model, samples):
    """N stays what training draws from."""
    other, batches = make_learnable_samples(30, seed=1), []

    def recording_collate(features):
        batches.append(len(features))
        return collate(features)

    callback = LoRADACallback(make_config(), train_dataset=other, data_collator=recording_collate)
    make_trainer(tmp_path / "given", lora_model(), samples, callback).train()
    direct = LoRADACallback(make_config())
    make_trainer(tmp_path / "direct", lora_model(), other, direct).train()
    assert (callback.report.population_size, direct.report.population_size) == (24, 30)
    assert max(batches) == 4
    assert callback.report.data_fingerprint == direct.report.data_fingerprint


def test_columns_that_the_trainer_drops_are_dropped_of_a_data_set_that_is_given(tmp_path, lora_model, samples):
    """The trainer's collator makes the batches, and cannot make a tensor of a text."""
    rows = Dataset.from_list([{**sample, "text": "words"} for sample in samples])
    callback = LoRADACallback(make_config(), train_dataset=rows)
    Trainer(lora_model(), make_args(tmp_path), pad_samples, rows, callbacks=[callback]).train()
    assert callback.report.layers


def test_trainers_that_make_their_completions_have_no_loss_to_start_from(tmp_path, lora_model, samples):
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path, lora_model(), samples, callback)
    trainer.args.num_generations = 8  # as GRPOConfig and RLOOConfig have
    with pytest.raises(UnsupportedSetupError, match="GRPO"):
        trainer.train()
    callback.train_dataset = samples
    trainer.train()
    assert callback.report is not None


def test_arguments_that_cannot_be_and_a_second_callback_are_errors(tmp_path, lora_model, tiny_llama, samples):
    with pytest.raises(ConfigError, match=r"LoRADAConfig.*not a dict"):
        LoRADACallback({"num_samples": 3})
    trainer = make_trainer(tmp_path, lora_model(), samples, LoRADACallback())
    with pytest.raises(ConfigError, match="a LoRADACallback already"):
        LoRADACallback().attach(trainer)
    with pytest.raises(ConfigError, match="search_step needs init_from"):
        LoRADACallback(search_step=True)
    model = get_peft_model(tiny_llama(), make_lora_config(), "lora_da")
    with pytest.raises(ConfigError, match="Give it another name"):
        make_trainer(tmp_path, model, samples, LoRADACallback()).train()


# Arguments


def parse(*flags):
    (arguments,) = HfArgumentParser(LoRADAArguments).parse_args_into_dataclasses(list(flags))
    return arguments.to_config()


def test_every_setting_is_a_flag_with_its_help_and_its_default():
    fields = {field.name: field for field in dataclasses.fields(LoRADAArguments)}
    assert set(fields) == {f"da_{setting.name}" for setting in dataclasses.fields(LoRADAConfig)}
    for setting in dataclasses.fields(LoRADAConfig):
        assert fields[f"da_{setting.name}"].metadata["help"] == setting.metadata["help"]
    assert parse() == LoRADAConfig()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--da_num_samples", "7", "--da_batch_size", "3"), {"num_samples": 7, "batch_size": 3}),
        (("--da_input_damping", "0.1*mean"), {"input_damping": "0.1*mean"}),
        (("--da_step_size", "None"), {"step_size": None}),
        (("--da-step-size", "0.3"), {"step_size": 0.3}),
        (("--da_freeze_a",), {"freeze_a": True}),
        (("--da_memory_budget", "8GiB"), {"memory_budget": "8GiB"}),
    ],
)
def test_a_flag_sets_its_setting_and_nothing_else(flags, expected):
    assert parse(*flags) == LoRADAConfig(**expected)
