"""TRL's trainers take the callback, and use their own loss where it is attached."""

import random

import pytest
import torch
from datasets import Dataset
from families.zoo import FAMILIES
from harness import (
    EIGHT,
    assert_initialized,
    assert_statistics_equal,
    autograd_statistics,
    chosen,
    items_of,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_tokenizer,
    once_each,
    stored_statistics,
    train_from,
)
from transformers import LlamaConfig, LlamaForSequenceClassification

from lora_da_hf import LoRADACallback, load_init
from lora_da_hf.losses import as_in_training_alone

trl = pytest.importorskip("trl")

# TRL 1.16 turns checkpointing on under its old name, which transformers 5.23 warns of, seen 2026-11
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def make_trl_args(kind, folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return kind(**{**settings, **overrides})


def make_callback(**overrides):
    return LoRADACallback(make_config(**{**EIGHT, **overrides}))


def test_the_event_file_of_tensorboard_has_what_it_did(tmp_path, lora_model, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    data = Dataset.from_list([{"input_ids": sample["input_ids"]} for sample in make_learnable_samples(24)])
    args = make_trl_args(trl.SFTConfig, tmp_path / "out", report_to=["tensorboard"])
    trainer = trl.SFTTrainer(lora_model(), args, train_dataset=data, processing_class=make_tokenizer())
    callback = make_callback().attach(trainer)
    trainer.train()
    (events,) = (tmp_path / "events").rglob("events.*")
    for name in callback.report.metrics():
        assert f"train/{name}".encode() in events.read_bytes()


def expected_of(trainer, model):
    """Compute the statistics of the first samples by autograd, with the trainer's loss on a fresh model."""
    collate = trainer.get_train_dataloader().collate_fn
    samples = chosen(trainer.train_dataset)
    found = autograd_statistics(model, samples, lambda model, batch: trainer.compute_loss(model, dict(batch)), collate)
    for values in trainer._metrics.values():
        values.clear()
    return found


def train_with_its_loss(trainer, callback):
    """Attach the callback and train. Returns the adapter that it started from, and the report."""
    callback.attach(trainer)
    return train_from(trainer), callback.report


def token_rows(count=24):
    return Dataset.from_list([{"input_ids": sample["input_ids"]} for sample in once_each(count)])


def make_sft(folder, model, callback, *, count=24, **arguments):
    return trl.SFTTrainer(
        model=model,
        args=make_trl_args(trl.SFTConfig, folder, **arguments),
        train_dataset=token_rows(count),
        processing_class=make_tokenizer(),
        peft_config=make_lora_config(),
        callbacks=[callback],
    )


@pytest.mark.support(
    "Trainers",
    "TRL's `SFTTrainer`",
    "by `LoRADACallback`, with the model's loss, or by `attach` with the trainer's",
)
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_with_its_own_loss_or_the_model_s(tmp_path, tiny_llama, lora_model, loss_type):
    callback = make_callback()
    trainer = make_sft(tmp_path, tiny_llama(), callback, loss_type=loss_type)
    start, report = train_with_its_loss(trainer, callback)
    assert_initialized(tmp_path / "lora_da", start, report)
    samples = [{**sample, "labels": sample["input_ids"]} for sample in chosen(once_each(24))]
    expected = autograd_statistics(
        lora_model(), samples, lambda model, batch: model(**batch).loss, items_of=items_of(report)
    )
    assert_statistics_equal(stored_statistics(tmp_path / "lora_da"), expected, 1e-4)
    assert load_init(tmp_path / "lora_da").peft_config["task_type"] == "CAUSAL_LM"


@pytest.mark.filterwarnings("ignore:.*did not match any:RuntimeWarning")
def test_sft_of_a_mixture_leaves_the_loss_of_its_routers_out(tmp_path):
    callback = make_callback()
    _, report = train_with_its_loss(make_sft(tmp_path, FAMILIES["Mixtral (experts)"].make_model(), callback), callback)
    assert report.loss_reduction.startswith("sum")


@pytest.mark.support("Trainers", "`SFTTrainer`, packing", "a packed row counts as one sample")
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_a_packed_row_is_one_sample(tmp_path, tiny_llama):
    callback = make_callback()
    trainer = make_sft(tmp_path, tiny_llama(), callback, count=96, packing=True, max_length=32)
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, callback.report)
    assert callback.report.population_size == len(trainer.train_dataset) < 96


@pytest.mark.support(
    "Trainers", "`SFTTrainer`, padding-free batches", "one sample at a time, since the samples are joined in one row"
)
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_padding_free_batches_give_the_statistics_of_padded_ones(tmp_path, tiny_llama):
    found = []
    for free in (False, True):
        folder = tmp_path / str(free)
        callback = make_callback()
        start = train_from(make_sft(folder, tiny_llama(), callback, padding_free=free, max_length=None))
        assert_initialized(folder / "lora_da", start, callback.report)
        found.append((callback.report, stored_statistics(folder / "lora_da")))
    assert [report.num_samples for report, _ in found] == [8, 8]
    assert found[1][0].batch_size == 1
    assert any("rows of 2 samples" in note for note in found[1][0].notes)
    assert_statistics_equal(found[1][1], found[0][1], 1e-4)


def preferences(count=24):
    generator = random.Random(0)
    rows = []
    for sample in make_learnable_samples(count):
        words = [f"w{token}" for token in sample["input_ids"]]
        noise = [f"w{generator.randrange(30, 90)}" for _ in range(generator.randint(2, 5))]
        rows.append(
            {"prompt": " ".join(words[:3]), "chosen": " " + " ".join(words[3:]), "rejected": " " + " ".join(noise)}
        )
    return Dataset.from_list(rows)


def make_dpo(folder, model, callback, peft_config=None, **arguments):
    return trl.DPOTrainer(
        model=model,
        args=make_trl_args(trl.DPOConfig, folder, **arguments),
        train_dataset=preferences(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        callbacks=[callback],
    )


@pytest.mark.support(
    "Trainers", "TRL's `DPOTrainer`, `peft_config`", "by `attach`; the reference is the base, adapters disabled"
)
def test_dpo_whose_reference_is_the_base(tmp_path, tiny_llama):
    callback = make_callback()
    check_dpo(tmp_path, make_dpo(tmp_path, tiny_llama(), callback, make_lora_config()), callback)


@pytest.mark.support(
    "Trainers",
    "`DPOTrainer`, a PEFT model",
    "its reference adapter is a copy from before the write, so it is the base",
)
def test_dpo_whose_reference_is_a_copy_of_the_adapter(tmp_path, lora_model):
    callback = make_callback()
    trainer = make_dpo(tmp_path, lora_model(), callback, use_weighting=True)
    assert "ref" in trainer.model.peft_config
    check_dpo(tmp_path, trainer, callback)
    reference = {name: p for name, p in trainer.model.named_parameters() if ".ref." in name}
    assert reference
    assert not any(p.any() for name, p in reference.items() if "lora_B" in name)
    assert not any(p.requires_grad for p in reference.values())


def check_dpo(folder, trainer, callback):
    """The search must move the policy and not the reference: only then does the loss leave log 2."""
    with as_in_training_alone(trainer):  # without WPO's weights, the policy's own probabilities
        expected = expected_of(trainer, trainer.model)
    start, report = train_with_its_loss(trainer, callback)
    assert_initialized(folder / "lora_da", start, report)
    assert_statistics_equal(stored_statistics(folder / "lora_da"), expected, 1e-4)
    assert report.search_loss_before == pytest.approx(0.693147, abs=1e-4)
    assert report.search_loss_after < 0.69
    assert dict(report.search)[report.step_size] == pytest.approx(report.search_loss_after, rel=1e-3)
    assert report.loss_reduction.startswith("sample_mean (measured")
    assert report.batch_size == 4
    first = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert first["rewards/margins"] > 0
    assert not trainer._metrics["eval"]


def make_reward(folder, callback, count=None):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, num_labels=1, initializer_range=0.2)
    torch.manual_seed(0)
    return trl.RewardTrainer(
        model=LlamaForSequenceClassification(config),
        args=make_trl_args(trl.RewardConfig, folder),
        train_dataset=preferences(**({} if count is None else {"count": count})).remove_columns("prompt"),
        processing_class=make_tokenizer(),
        peft_config=make_lora_config(task_type="SEQ_CLS"),
        callbacks=[callback],
    )


@pytest.mark.support("Trainers", "TRL's `RewardTrainer`", "by `LoRADACallback(...).attach(trainer)`")
def test_a_reward_model(tmp_path):
    callback = make_callback(fit_heads=False)
    trainer = make_reward(tmp_path, callback)
    expected = expected_of(trainer, trainer.model)
    start, report = train_with_its_loss(trainer, callback)
    assert_initialized(tmp_path / "lora_da", start, report)
    assert_statistics_equal(stored_statistics(tmp_path / "lora_da"), expected, 1e-4)
    assert report.loss_reduction.startswith("sample_mean (measured")
    assert report.batch_size == 4
    assert report.search_loss_after < report.search_loss_before
    assert not trainer._metrics["eval"]


def test_the_head_of_a_reward_model_is_fitted_first(tmp_path):
    callback = make_callback(num_samples=32)
    _, report = train_with_its_loss(make_reward(tmp_path, callback, count=400), callback)
    assert any("score was fitted first, on 96 samples" in note for note in report.notes), report.notes


def test_the_metrics_of_an_evaluation_are_those_of_trl_alone(tmp_path, tiny_llama):
    """The pass runs the loss in evaluation mode, where TRL averages what it writes down until it is logged."""
    logged = []
    for number, with_loss in enumerate((False, True)):
        callback = make_callback()
        trainer = make_sft(tmp_path / str(number), tiny_llama(), callback, learning_rate=0.0, max_steps=1)
        if with_loss:
            callback.attach(trainer)
        trainer.train()
        logged.append(trainer.evaluate(token_rows(8)))
    assert logged[1]["eval_entropy"] == pytest.approx(logged[0]["eval_entropy"], rel=1e-3)
