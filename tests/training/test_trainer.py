import hashlib
from dataclasses import dataclass

import pytest
import torch
from accelerate import dispatch_model
from datasets import IterableDataset
from harness import (
    adapter_weights,
    assert_initialized,
    assert_same_tensors,
    assert_statistics_equal,
    autograd_statistics,
    base_linear_layers,
    collate,
    factors,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_trainer,
    stored_statistics,
    train_from,
    turn_checkpointing_on,
    written_adapter,
)
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainerCallback

from lora_da_hf import LoRADACallback, LoRADATrainer, load_init
from lora_da_hf.errors import ConfigError, DataError, TargetError
from lora_da_hf.training import callback as callback_module


@pytest.fixture
def count_initializations(monkeypatch):
    """Return a list that grows with each initialisation."""
    calls = []
    original = callback_module.initialize_lora_da

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(callback_module, "initialize_lora_da", counted)
    return calls


class Recording:
    """Records the batches of training, in order, and the state of the random generator in each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not hasattr(self, "batches"):
            self.batches, self.random_states = [], []
        self.batches.append(inputs["input_ids"].clone())
        self.random_states.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        return super().training_step(model, inputs, num_items_in_batch)


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingLoRADATrainer(Recording, LoRADATrainer):
    pass


# What it takes


def test_everything_but_the_start_of_the_adapter_is_as_with_trainer(tmp_path, lora_model, samples):
    trainers = []
    for kind in (RecordingTrainer, RecordingLoRADATrainer):
        trainers.append(make_trainer(tmp_path / kind.__name__, lora_model(), samples, kind, {"max_steps": 8}))
        trainers[-1].train()
    plain, ours = trainers
    assert len(ours.batches) == len(plain.batches) == 8
    for found, expected in zip(ours.batches, plain.batches, strict=True):
        assert torch.equal(found, expected)
    assert ours.random_states == plain.random_states
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (ours, plain)]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8


def test_the_adapter_that_peft_config_makes_does_not_depend_on_what_ran_before(tmp_path, tiny_llama, samples):
    weights = []
    for number in (1, 2):
        torch.rand(number)
        trainer = make_trainer(tmp_path / str(number), tiny_llama(), samples, peft_config=make_lora_config())
        weights.append(adapter_weights(trainer.model))
    assert_same_tensors(weights[0], weights[1])


# The loss


class CallsSuper(LoRADATrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = 3 * loss
        return (loss, outputs) if return_outputs else loss


class TokenMean(LoRADATrainer):
    """A loss of its own that divides by the batch's labels, whatever it is told."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten()) * 2
        return (loss, outputs) if return_outputs else loss


def loss_by_items(outputs, labels, num_items_in_batch=None):
    """Divide by the number of items, as `Trainer` always gives one."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def equally_long(samples):
    """Cut samples to as many labels each, so that a mean over labels is one over samples."""
    return [
        {name: values[:6] for name, values in sample.items()} | {"labels": sample["input_ids"][:6]}
        for sample in samples
    ]


def sample_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[0, :-1], batch["labels"][0, 1:])


@pytest.mark.parametrize(
    ("kind", "settings", "factor"),
    [
        pytest.param(LoRADATrainer, {}, 1, id="the model's"),
        pytest.param(CallsSuper, {}, 3, id="overridden, calling super"),
        pytest.param(TokenMean, {}, 2, id="overridden, a batch mean"),
        pytest.param(LoRADATrainer, {"compute_loss_func": loss_by_items}, 1, id="compute_loss_func, a sum"),
    ],
)
def test_statistics_are_those_of_the_trainers_own_loss(tmp_path, lora_model, samples, kind, settings, factor):
    samples = equally_long(samples)
    config = make_config(num_samples=24, search_samples=0, save_statistics=True, step_size=0.01)
    trainer = make_trainer(tmp_path, lora_model(), samples, kind, da_config=config, **settings)
    trainer.train()
    expected = autograd_statistics(lora_model(), samples, lambda m, b: factor * sample_loss(m, b))
    assert_statistics_equal(stored_statistics(tmp_path / "lora_da"), expected, 2e-5)
    assert trainer.lora_da_report.batch_size == 4


# The first step


def test_training_goes_on_from_the_written_weights_as_trainer_would(tmp_path, tiny_llama, samples):
    arguments = {"max_steps": 3}
    ours = make_trainer(
        tmp_path / "ours", tiny_llama(), samples, arguments=arguments, peft_config=make_lora_config(lora_dropout=0.1)
    )
    ours.train()
    start = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours" / "lora_da", is_trainable=True)
    before = adapter_weights(start)
    plain = make_trainer(tmp_path / "plain", start, samples, Trainer, arguments=arguments)
    plain.train()
    after = adapter_weights(ours.model)
    assert_same_tensors(after, adapter_weights(plain.model))
    assert any(not torch.equal(after[name], before[name]) for name in before)


# Once


def test_a_resumed_run_is_not_initialised_and_ends_where_an_uninterrupted_one_does(
    tmp_path, tiny_llama, samples, count_initializations
):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings = {"peft_config": make_lora_config(), "arguments": arguments}
    whole = make_trainer(tmp_path, tiny_llama(), samples, **settings)
    whole.train()
    assert len(count_initializations) == 1
    resumed = make_trainer(tmp_path, tiny_llama(), samples, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(count_initializations) == 1
    assert_same_tensors(adapter_weights(resumed.model), adapter_weights(whole.model))
    assert resumed.lora_da_report.step_size == whole.lora_da_report.step_size


def test_a_config_that_was_stored_makes_an_adapter_that_trains(tmp_path, tiny_llama, samples):
    make_lora_config(inference_mode=True).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    trainer = make_trainer(tmp_path / "out", tiny_llama(), samples, peft_config=config, arguments={"max_steps": 1})
    trainer.train()
    assert config.inference_mode
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


@dataclass
class OthersLoraConfig(LoraConfig):
    """As ms-swift's, with fields of its own; Axolotl leaves ``fan_in_fan_out`` None."""

    lora_dtype: str | None = None


def test_a_lora_config_of_another_library_is_taken_and_stored(tmp_path, tiny_llama, samples):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "fan_in_fan_out": None}
    trainer = make_trainer(
        tmp_path, tiny_llama(), samples, peft_config=OthersLoraConfig(**settings), arguments={"max_steps": 1}
    )
    trainer.train()
    assert load_init(tmp_path / "lora_da").manifest.layers


def test_resuming_from_the_output_folder_leaves_the_initialisation_alone(tmp_path, lora_model, samples):
    first = make_trainer(tmp_path, lora_model(), samples, arguments={"max_steps": 2})
    first.train()
    first.save_model()
    first.save_state()
    written = {path.name: path.read_bytes() for path in (tmp_path / "lora_da").iterdir()}
    trained, found = adapter_weights(first.model), []

    class Watching(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            found.append(adapter_weights(model))

    second = make_trainer(tmp_path, lora_model(), samples, arguments={"max_steps": 4}, callbacks=[Watching()])
    second.train(resume_from_checkpoint=str(tmp_path))
    found[0] = {name: tensor for name, tensor in found[0].items() if name in trained}
    assert_same_tensors(found[0], trained)
    assert second.state.global_step == 4
    second.save_model()
    assert list(second.model.peft_config) == ["default"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora_da").iterdir()} == written


class RunsOutOfMemory(LoRADATrainer):
    """Fails in its first training step, unless the batch is small."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.sizes = [*getattr(self, "sizes", []), len(inputs["input_ids"])]
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.support("Trainers", "`auto_find_batch_size`", "the initialisation is kept when training starts over")
def test_a_smaller_batch_size_after_running_out_of_memory_keeps_the_initialisation(
    tmp_path, lora_model, samples, count_initializations
):
    arguments = {"auto_find_batch_size": True, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, lora_model(), samples, RunsOutOfMemory, arguments=arguments)
    start = train_from(trainer)
    assert trainer.sizes[0] == 4
    assert trainer.sizes[-1] < 4
    assert len(count_initializations) == 1
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)
    assert_same_tensors(adapter_weights(trainer.model), written_adapter(tmp_path / "lora_da"))
    assert [e["step"] for e in trainer.state.log_history if "lora_da_step_size" in e] == [0]


# A frozen A


def make_frozen_a_trainer(folder, model, samples, with_callback=False, **settings):
    config, arguments = make_config(freeze_a=True), {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    start = {"callbacks": [LoRADACallback(config)]} if with_callback else {"da_config": config}
    return make_trainer(
        folder, model, samples, Trainer if with_callback else LoRADATrainer, arguments, **start, **settings
    )


def assert_b_alone_is_trained(trainer):
    named = dict(trainer.model.named_parameters())
    ours = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert ours == {id(p) for name, p in named.items() if "lora_B" in name}
    assert {name for name, p in named.items() if p.requires_grad} == {name for name in named if "lora_B" in name}


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_frozen_a_is_not_in_the_optimizer_and_does_not_change(tmp_path, lora_model, samples, with_callback):
    trainer = make_frozen_a_trainer(tmp_path, lora_model(), samples, with_callback)
    trainer.train()
    assert_b_alone_is_trained(trainer)
    start, end = written_adapter(tmp_path / "lora_da"), adapter_weights(trainer.model)
    assert_same_tensors(factors(end, "A"), factors(start, "A"))
    assert all(not torch.equal(end[name], start[name]) for name in factors(start, "B"))


def test_a_frozen_a_of_an_adapter_with_another_name_stays_frozen_in_a_resumed_run(tmp_path, tiny_llama, samples):
    whole, resumed = (
        make_frozen_a_trainer(tmp_path, PeftModel(tiny_llama(), make_lora_config(), adapter_name="mine"), samples)
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_b_alone_is_trained(resumed)
    assert_same_tensors(adapter_weights(resumed.model), adapter_weights(whole.model))


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_of_a_model_from_model_init_does_not_change(tmp_path, lora_model, samples, with_callback):
    """A bare callback freezes it when the optimizer has it already."""
    trainer = make_frozen_a_trainer(tmp_path, None, samples, with_callback, model_init=lambda: lora_model())
    trainer.train()
    if not with_callback:
        assert_b_alone_is_trained(trainer)
    start, end = written_adapter(tmp_path / "lora_da"), adapter_weights(trainer.model)
    assert_same_tensors(factors(end, "A"), factors(start, "A"))


class WithReference(LoRADATrainer):
    """A loss that looks at the base model between, as DPO's and those with a KL term do."""

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.model(**inputs).logits
        outputs = model(**inputs)
        return outputs.loss + 0.1 * (outputs.logits - reference).square().mean()


def test_a_frozen_a_stays_frozen_where_adapters_are_switched_off_and_on(tmp_path, lora_model, samples):
    seen = []

    class LooksAtGradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model=None, **__):
            seen.append({name for name, p in model.named_parameters() if p.grad is not None})

    model = lora_model()
    turn_checkpointing_on(model, reentrant=False)
    settings = {"da_config": make_config(freeze_a=True), "callbacks": [LooksAtGradients()]}
    trainer = make_trainer(tmp_path, model, samples, WithReference, {"max_steps": 2}, **settings)
    trainer.train()
    assert seen == 2 * [{name for name, _ in trainer.model.named_parameters() if "lora_B" in name}]


# Precision and memory


def test_bf16_training_takes_statistics_under_autocast(tmp_path, lora_model, samples, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    found = {}
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        model = lora_model()
        dtypes = set()
        for layer in base_linear_layers(model).values():
            layer.register_forward_hook(lambda _, args, output, dtypes=dtypes: dtypes.add(output.dtype))
        config = make_config(save_statistics=True)
        make_trainer(folder, model, samples, da_config=config, arguments={"bf16": bf16}).train()
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        found[bf16] = stored_statistics(folder / "lora_da")
    assert_statistics_equal(found[True], found[False], 0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, lora_model, samples, use_reentrant):
    reports, statistics = [], []
    for arguments in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        model, folder = lora_model(), tmp_path / str(len(reports))
        model.enable_input_require_grads()  # what Trainer asks for with one kind of checkpointing
        trainer = make_trainer(folder, model, samples, arguments=arguments, da_config=make_config(save_statistics=True))
        trainer.train()
        reports.append(trainer.lora_da_report)
        statistics.append(stored_statistics(folder / "lora_da"))
    assert_statistics_equal(statistics[1], statistics[0], 1e-6)
    assert reports[1].step_size == pytest.approx(reports[0].step_size, rel=1e-4)


def test_a_model_with_a_device_map_gives_the_same(tmp_path, tiny_llama, samples):
    reports, statistics = [], []
    for dispatched in (False, True):
        model = tiny_llama()
        if dispatched:
            model = dispatch_model(model, device_map={"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
        folder = tmp_path / str(dispatched)
        config = make_config(save_statistics=True)
        trainer = make_trainer(folder, model, samples, da_config=config, peft_config=make_lora_config())
        trainer.train()
        reports.append(trainer.lora_da_report)
        statistics.append(stored_statistics(folder / "lora_da"))
    assert_statistics_equal(statistics[1], statistics[0], 1e-6)
    assert reports[1].step_size == reports[0].step_size


def test_the_pass_has_the_batch_size_of_one_of_several_gpus(tmp_path, lora_model, samples, count_initializations):
    class FourGPUs(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args._n_gpu = 4

    settings = {"callbacks": [FourGPUs()], "compute_loss_func": loss_by_items}
    trainer = make_trainer(tmp_path, lora_model(), samples, arguments={"per_device_train_batch_size": 8}, **settings)
    trainer.train()
    assert [call["batch_size"] for call in count_initializations] == [2]
    assert trainer.lora_da_report.loss_reduction.startswith("sum")


# Data


class Stream(TorchIterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def make_stream(kind, samples):
    return Stream(samples) if kind == "torch" else IterableDataset.from_generator(lambda: iter(samples))


@pytest.mark.support(
    "Trainers",
    "Streams (`IterableDataset`)",
    "samples are read from the head; the variance term counts the samples that training will draw",
)
@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_a_stream_is_read_from_its_head_and_trained_on_from_its_head(tmp_path, lora_model, samples, kind):
    stream, arguments = make_stream(kind, samples), {"max_steps": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(tmp_path, lora_model(), stream, RecordingLoRADATrainer, arguments=arguments)
    start = train_from(trainer)
    report = trainer.lora_da_report
    assert_initialized(tmp_path / "lora_da", start, report)
    assert (report.population_size, report.num_samples) == (2 * 3 * 4, 12)
    assert torch.equal(trainer.batches[0], collate(samples[:4])["input_ids"])
    again = make_trainer(tmp_path / "again", lora_model(), samples[: report.num_samples + 8], arguments={"seed": 1})
    again.train()
    assert again.lora_da_report.data_fingerprint != report.data_fingerprint  # drawn at random of a list


def test_a_stream_that_can_be_read_once_is_an_error(tmp_path, lora_model, samples):
    class Once(Stream):
        def __iter__(self):
            self.rest = getattr(self, "rest", None) or iter(self.samples)
            return self.rest

    stream = Once(samples)
    with pytest.raises(DataError, match="can be read only once"):
        make_trainer(tmp_path, lora_model(), stream).train()
    assert next(iter(stream)) == samples[0]


def test_the_random_choice_of_samples_follows_the_trainers_seed(tmp_path, lora_model):
    prints = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        trainer = make_trainer(folder, lora_model(), make_learnable_samples(80), arguments={"seed": seed})
        trainer.train()
        prints.append(trainer.lora_da_report.data_fingerprint)
    assert prints[0] == prints[1] != prints[2]


# Errors


@pytest.mark.parametrize(
    ("base", "settings", "error", "message"),
    [
        ("plain", {}, TargetError, "no LoRA layer"),
        ("adapter", {"peft_config": make_lora_config()}, ConfigError, "has an adapter already"),
        ("plain", {"peft_config": IA3Config(target_modules=["k_proj"])}, TargetError, "IA3Config"),
        ("plain", {"peft_config": AdaLoraConfig(total_step=10)}, TargetError, "AdaLoraConfig"),
        ("adapter", {"callbacks": [LoRADACallback()]}, ConfigError, "has a LoRADACallback already"),
    ],
)
def test_what_the_trainer_cannot_take_is_an_error(
    tmp_path, tiny_llama, lora_model, samples, base, settings, error, message
):
    model = {"plain": tiny_llama, "adapter": lora_model}[base]()
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, model, samples, **settings)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", False])
def test_a_start_of_peft_that_changes_the_base_is_refused_before_it_does(tmp_path, tiny_llama, samples, start):
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match="init_lora_weights"):
        make_trainer(tmp_path, model, samples, peft_config=make_lora_config(init_lora_weights=start))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_base_that_another_trainer_put_its_adapter_into_is_an_error(tmp_path, tiny_llama, samples):
    model = tiny_llama()
    first = make_trainer(tmp_path / "first", model, samples, peft_config=make_lora_config())
    with pytest.raises(TargetError, match="in place"):
        make_trainer(tmp_path / "second", model, samples).train()
    with pytest.raises(ConfigError, match="has an adapter already"):
        make_trainer(tmp_path / "second", model, samples, peft_config=make_lora_config())
    make_trainer(tmp_path / "second", first.model, samples)


def test_a_second_trainer_says_that_its_settings_have_no_effect(tmp_path, lora_model, samples, caplog):
    model = lora_model()
    first = make_trainer(tmp_path / "first", model, samples)
    first.train()
    report = first.lora_da_report
    caplog.clear()
    first.train()
    assert first.lora_da_report is report
    assert "settings given now" not in caplog.text
    before = adapter_weights(model)
    second = make_trainer(tmp_path / "second", model, samples, arguments={"learning_rate": 0.0})
    second.train()
    assert "was initialised before in this process and stays as it is; the settings given now have no" in caplog.text
    assert second.lora_da_report is None
    assert_same_tensors(adapter_weights(model), before)
