import dataclasses

import pytest
import torch
from datasets import Dataset
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    collate,
    make_args,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_tokenizer,
    stored_statistics,
    written_adapter,
)
from peft import PeftModel
from transformers import HfArgumentParser, Trainer, TrainingArguments

from lora_da_hf import LoRADACallback, LoRADAConfig, LoRADATrainer
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import ConfigError, DataError, UnsupportedSetupError
from lora_da_hf.training.arguments import LoRADAArguments
from lora_da_hf.training.trainer_loss import adapt_loss


def make_trainer(folder, model, samples, callback, **arguments):
    return Trainer(
        model=model,
        args=make_args(folder, **arguments),
        train_dataset=samples,
        data_collator=collate,
        callbacks=[callback],
    )


def test_a_plain_trainer_with_the_callback_does_what_our_trainer_does(tmp_path, lora_model, samples):
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path / "callback", lora_model(), samples, callback, max_steps=2)
    trainer.train()
    ours = LoRADATrainer(
        model=lora_model(),
        args=make_args(tmp_path / "trainer", max_steps=2),
        train_dataset=samples,
        data_collator=collate,
        da_config=make_config(),
    )
    ours.train()
    written = written_adapter(tmp_path / "callback" / "lora_da")
    assert_same_tensors(written, written_adapter(tmp_path / "trainer" / "lora_da"))
    assert_same_tensors(adapter_weights(trainer.model), adapter_weights(ours.model))
    assert len(callback.report.layers) == LINEAR_LAYERS
    assert callback.report.batch_size == 4
    logged = [entry for entry in trainer.state.log_history if "lora_da_step_size" in entry]
    assert [entry["step"] for entry in logged] == [0]
    assert logged[0]["lora_da_step_size"] == callback.report.step_size > 0


def test_the_default_settings_are_used_without_any(tmp_path, lora_model, samples):
    callback = LoRADACallback()
    make_trainer(tmp_path, lora_model(), samples, callback).train()
    assert callback.report.config == LoRADAConfig().to_dict()


def test_a_loss_that_is_given_is_the_one_of_the_statistics(tmp_path, lora_model, samples):
    def doubled(model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * model(**inputs, num_items_in_batch=num_items_in_batch).loss

    found = []
    for number, loss in enumerate((None, doubled)):
        folder = tmp_path / str(number)
        config = make_config(save_statistics=True)
        make_trainer(folder, lora_model(), samples, LoRADACallback(config, compute_loss=loss)).train()
        found.append(stored_statistics(folder / "lora_da"))
    halved = {
        name: dataclasses.replace(
            layer,
            weight_grad=layer.weight_grad / 2,
            output_grad_second_moment_diag=layer.output_grad_second_moment_diag / 4,
        )
        for name, layer in found[1].items()
    }
    assert_statistics_equal(halved, found[0], 1e-5)


def test_the_trainers_loss_can_be_given_after_it_was_made(tmp_path, lora_model, samples):
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path / "callback", lora_model(), samples, callback, label_smoothing_factor=0.3)
    callback.compute_loss = trainer.compute_loss
    trainer.train()
    ours = LoRADATrainer(
        model=lora_model(),
        args=make_args(tmp_path / "trainer", label_smoothing_factor=0.3),
        train_dataset=samples,
        data_collator=collate,
        da_config=make_config(),
    )
    ours.train()
    written = [written_adapter(tmp_path / which / "lora_da") for which in ("callback", "trainer")]
    assert_same_tensors(*written)


def test_label_smoothing_that_the_callback_cannot_see_is_a_warning(tmp_path, lora_model, samples, caplog):
    callback = LoRADACallback(make_config())
    make_trainer(tmp_path, lora_model(), samples, callback, label_smoothing_factor=0.3).train()
    assert "Set its compute_loss to trainer.compute_loss" in caplog.text


def test_a_loss_of_trl_that_the_callback_cannot_see_is_a_warning(tmp_path, lora_model, samples, caplog):
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path, lora_model(), samples, callback)
    trainer.args.loss_type = "sigmoid"
    trainer.train()
    assert "the loss that the model returns, without loss_type sigmoid. Set its compute_loss" in caplog.text


def test_the_models_loss_is_the_one_to_search_on_where_trl_trains_a_surrogate(tmp_path, lora_model, samples, caplog):
    """The value of DFT's loss, ``-p log p``, rises where p does, as long as p is small."""
    callback = LoRADACallback(make_config())
    trainer = make_trainer(tmp_path, lora_model(), samples, callback)
    trainer.args.loss_type = "dft"
    trainer.train()
    assert "Set its compute_loss" not in caplog.text
    assert callback.report.search_loss_after < callback.report.search_loss_before


def test_columns_that_the_trainer_drops_are_dropped_of_a_data_set_that_is_given(tmp_path, lora_model, samples):
    """The trainer's collator makes the batches, and cannot make a tensor of a text."""
    rows, seen = Dataset.from_list([{**sample, "text": "words"} for sample in samples]), set()

    def collate_tokens(features):
        seen.update(name for feature in features for name in feature)
        return collate(features)

    for settings in ({}, {"data_collator": collate_tokens}):
        callback = LoRADACallback(make_config(), train_dataset=rows, **settings)
        args = make_args(tmp_path / str(len(settings)), max_steps=1)
        trainer = Trainer(lora_model(), args, collate_tokens, rows, callbacks=[callback])
        trainer.train()
        assert callback.report.layers
        assert ("text" in seen) == bool(settings)  # a collator of the callback's own gets all that there is


def test_a_data_set_and_a_collator_that_are_given_are_used(tmp_path, lora_model, samples):
    other = make_learnable_samples(30, seed=1)
    batches = []

    def recording_collate(features):
        batches.append(len(features))
        return collate(features)

    callback = LoRADACallback(make_config(), train_dataset=other, data_collator=recording_collate)
    make_trainer(tmp_path / "given", lora_model(), samples, callback).train()
    direct = LoRADACallback(make_config(population_size=len(samples)))
    make_trainer(tmp_path / "direct", lora_model(), other, direct).train()
    assert callback.report.population_size == len(samples)  # what training draws from
    assert len(samples) != len(other)
    config = make_config(population_size=5000)
    said = LoRADACallback(config, train_dataset=other)
    make_trainer(tmp_path / "said", lora_model(), samples, said).train()
    assert said.report.population_size == 5000
    assert max(batches) == 4
    assert callback.report.data_fingerprint == direct.report.data_fingerprint
    written = [written_adapter(tmp_path / which / "lora_da") for which in ("given", "direct")]
    assert_same_tensors(*written)


def test_another_adapter_than_the_active_one_can_be_named(tmp_path, lora_model, samples):
    model = lora_model()
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    callback = LoRADACallback(make_config(step_size=0.1), adapter_name="second")
    make_trainer(tmp_path, model, samples, callback, learning_rate=0.0).train()
    assert {layer.rank for layer in callback.report.layers} == {2}
    b = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert all(p.any() for name, p in b.items() if "second" in name)
    assert not any(p.any() for name, p in b.items() if "default" in name)


def test_two_trainers_with_callbacks_on_one_model_initialise_it_once(tmp_path, lora_model, samples):
    model = lora_model()
    first, second = LoRADACallback(make_config()), LoRADACallback(make_config())
    make_trainer(tmp_path / "first", model, samples, first, learning_rate=0.0).train()
    weights = adapter_weights(model)
    make_trainer(tmp_path / "second", model, samples, second, learning_rate=0.0).train()
    assert first.report is not None
    assert second.report is None
    assert_same_tensors(adapter_weights(model), weights)


def test_a_resumed_run_finds_the_report_of_the_first(tmp_path, lora_model, samples):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first, second = LoRADACallback(make_config()), LoRADACallback(make_config())
    whole = make_trainer(tmp_path, lora_model(), samples, first, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, lora_model(), samples, second, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    recalled, made = second.report.to_dict(), first.report.to_dict()
    recalled["seconds"]["save"] = made["seconds"]["save"]  # the file cannot tell how long it took to write it
    assert recalled == made
    assert_same_tensors(adapter_weights(resumed.model), adapter_weights(whole.model))


def test_trainers_that_make_their_completions_have_no_loss_to_start_from(tmp_path, lora_model, samples):
    args = make_args(tmp_path, max_steps=1)
    args.num_generations = 8  # as GRPOConfig and RLOOConfig have
    callback = LoRADACallback(make_config())
    trainer = Trainer(lora_model(), args, train_dataset=samples, data_collator=collate, callbacks=[callback])
    with pytest.raises(UnsupportedSetupError, match="makes its completions itself"):
        trainer.train()
    callback.train_dataset = samples
    trainer.train()
    assert callback.report is not None


def test_a_callback_without_model_or_data_says_what_to_do(tmp_path, lora_model):
    callback, arguments = LoRADACallback(), make_args(tmp_path)
    state = Trainer(model=lora_model(), args=arguments).state
    with pytest.raises(DataError, match=r"handed no model to its callbacks. Use initialize_lora_da before training"):
        callback.on_train_begin(arguments, state, None)
    with pytest.raises(DataError, match=r"no train_dataloader. Give LoRADACallback a train_dataset"):
        callback.on_train_begin(arguments, state, None, model=lora_model())


def test_freezing_a_after_ddp_counted_on_its_gradient_is_an_error(tmp_path, lora_model, samples, monkeypatch):
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 2)))
    trainer = make_trainer(tmp_path, lora_model(), samples, LoRADACallback(make_config()))
    late = LoRADACallback(make_config(freeze_a=True))
    optimizer = trainer.create_optimizer()
    with pytest.raises(ConfigError, match="freeze_a came too late: the optimizer has A already"):
        late.on_train_begin(trainer.args, trainer.state, None, model=trainer.model, optimizer=optimizer)


def test_the_model_gets_no_number_of_items_from_a_loss_that_takes_none():
    def old_loss(model, inputs):
        return inputs["x"].sum()

    loss = adapt_loss(old_loss)
    assert loss(torch.nn.Identity(), {"x": torch.ones(3)}, torch.tensor(2)).item() == 3


# TRL


# TRL 1.16 turns checkpointing on under its old name, which transformers 5.23 warns of, seen 2026-11
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trls_sft_trainer_takes_the_callback(tmp_path, tiny_llama):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_list([{"input_ids": s["input_ids"]} for s in make_learnable_samples(24)])
    callback = LoRADACallback(make_config())
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=make_lora_config(),
        callbacks=[callback],
    )
    trainer.train()
    assert len(callback.report.layers) == LINEAR_LAYERS
    assert callback.report.num_samples == 12
    assert callback.report.step_size > 0
    assert "lora_da_step_size" in trainer.state.log_history[0]
    written = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora_da")
    batch = collate([{**s, "labels": s["input_ids"]} for s in make_learnable_samples(24)])
    losses = [trainer.model.eval()(**batch).loss, written(**batch).loss, tiny_llama().eval()(**batch).loss]
    assert losses[0] < losses[1] < losses[2]


# Arguments


def parse(*flags):
    (arguments,) = HfArgumentParser(LoRADAArguments).parse_args_into_dataclasses(list(flags))
    return arguments.to_config()


def test_every_setting_is_a_flag_with_its_help():
    fields = {field.name: field for field in dataclasses.fields(LoRADAArguments)}
    settings = dataclasses.fields(LoRADAConfig)
    assert set(fields) == {f"da_{setting.name}" for setting in settings}
    for setting in settings:
        assert fields[f"da_{setting.name}"].metadata["help"] == setting.metadata["help"]
        assert fields[f"da_{setting.name}"].default == setting.default


def test_no_flag_gives_the_default_settings():
    assert parse() == LoRADAConfig()


OTHER_VALUES = {
    "num_samples": 7,
    "batch_size": 3,
    "sample_selection": "head",
    "search_samples": 5,
    "population_size": 1234,
    "seed": 11,
    "token_mask": "labels",
    "fisher": "sampled",
    "loss_reduction": "token_mean",
    "accumulate_dtype": "float64",
    "metric": "fisher",
    "input_damping": 1e-6,
    "output_damping": "0.5*median",
    "bias_weight": 0.5,
    "variance_weight": 0.25,
    "normalize_guidance_terms": True,
    "layer_steps": "equal",
    "projected_rms": 0.3,
    "step_size": 0.02,
    "stable_gamma": 64.0,
    "factor_split": "balanced",
    "uncalled_layers": "keep",
    "freeze_a": True,
    "solver": "krylov",
    "solve_dtype": "float32",
    "max_rank": 9,
    "save_statistics": True,
    "memory_budget": "8GiB",
    "rank_budget": 1000,
    "schedule": "samples",
    "statistics_save_steps": 10,
}


def test_other_values_are_known_for_every_setting():
    assert set(OTHER_VALUES) == {setting.name for setting in dataclasses.fields(LoRADAConfig)}
    assert all(getattr(LoRADAConfig(), name) != value for name, value in OTHER_VALUES.items())


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_a_flag_sets_its_setting_and_nothing_else(name):
    value = OTHER_VALUES[name]
    assert parse(f"--da_{name}", str(value)) == LoRADAConfig(**{name: value})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--da_input_damping", "0.1*mean"), {"input_damping": "0.1*mean"}),
        (("--da_input_damping", "1e-6"), {"input_damping": 1e-6}),
        (("--da_step_size", "none"), {"step_size": None}),
        (("--da_step_size", "None"), {"step_size": None}),
        (("--da_step_size", "line_search"), {"step_size": "line_search"}),
        (("--da_step_size", "0.3"), {"step_size": 0.3}),
        (("--da_freeze_a",), {"freeze_a": True}),
        (("--da_layer_steps", "equal"), {"layer_steps": "equal"}),
    ],
)
def test_flags_that_are_a_number_or_a_word(flags, expected):
    assert parse(*flags) == LoRADAConfig(**expected)


def test_a_config_file_gives_numbers_and_none_as_they_are():
    values = {"da_step_size": None, "da_input_damping": 1e-6, "da_num_samples": 8}
    (arguments,) = HfArgumentParser(LoRADAArguments).parse_dict(values)
    assert arguments.to_config() == LoRADAConfig(step_size=None, input_damping=1e-6, num_samples=8)


def test_a_bad_value_of_a_flag_is_the_error_of_the_setting():
    with pytest.raises(ConfigError, match=r"input_damping='0.1\*max' is not a damping"):
        parse("--da_input_damping", "0.1*max")
    with pytest.raises(SystemExit):
        parse("--da_solver", "magic")


def test_the_seed_flag_stays_trainers_own(tmp_path):
    parser = HfArgumentParser((TrainingArguments, LoRADAArguments))
    training, ours = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--seed", "3", "--da_seed", "5", "--report_to", "none"]
    )
    assert (training.seed, ours.to_config().seed) == (3, 5)
