"""Ways to run a trainer that people use: compiled, in half precision, searched over, with and without our class."""

import sys
import types
from pathlib import Path

import pytest
import torch
from families.zoo import FAMILIES
from harness import (
    EIGHT,
    LINEAR_LAYERS,
    Starts,
    adapter_weights,
    assert_initialized,
    assert_made_from_data,
    assert_same_tensors,
    assert_statistics_equal,
    autograd_statistics,
    chosen,
    items_of,
    make_args,
    make_config,
    make_lora_config,
    make_tokenizer,
    make_trainer,
    stored_statistics,
    train_from,
    written_adapter,
)
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.integrations import integration_utils
from transformers.trainer_utils import BestRun

from lora_da_hf import LoRADACallback, LoRADATrainer


@pytest.mark.support(
    "Trainers", "`Trainer` with `LoRADACallback`", "the loss that the model returns; the trainer's with `attach`"
)
def test_a_plain_trainer_with_the_callback(tmp_path, lora_model, samples):
    callback = LoRADACallback(make_config())
    start = train_from(make_trainer(tmp_path, lora_model(), samples, Trainer, callbacks=[callback]))
    assert_initialized(tmp_path / "lora_da", start, callback.report)


@pytest.mark.support("Trainers", "`LoRADATrainer` (`Trainer`)", "its own loss, data, collator, precision and device")
def test_our_trainer(tmp_path, tiny_llama, samples):
    trainer = make_trainer(tmp_path, tiny_llama(), samples, peft_config=make_lora_config())
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)


@pytest.mark.support("Trainers", "`Seq2SeqTrainer`", "by `LoRADACallback(...).attach(trainer)`")
def test_a_sequence_to_sequence_trainer(tmp_path):
    """Its loss has label smoothing, which the model's own has not, and its collator makes the decoder's inputs."""
    family, callback = FAMILIES["T5"], LoRADACallback(make_config(**EIGHT, step_size=0.1))
    samples = family.samples(24)

    def make_model():
        return get_peft_model(family.make_model(), make_lora_config(task_type="SEQ_2_SEQ_LM"))

    model = make_model()
    collator = DataCollatorForSeq2Seq(make_tokenizer(), model=model)
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(tmp_path, Seq2SeqTrainingArguments, max_steps=3, label_smoothing_factor=0.2),
        train_dataset=samples,
        data_collator=collator,
    )
    callback.attach(trainer)
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, callback.report)

    def smoothed(model, batch):
        return cross_entropy(model(**batch).logits.transpose(1, 2), batch["labels"], label_smoothing=0.2)

    expected = autograd_statistics(
        make_model(), chosen(samples), smoothed, collator, items_of(callback.report, shifted=False)
    )
    assert_statistics_equal(stored_statistics(tmp_path / "lora_da"), expected, 1e-4)


@pytest.mark.support("Trainers", "a trainer of your own", "`class MyTrainer(LoRADATrainer, Seq2SeqTrainer)`")
def test_a_trainer_that_inherits_from_ours_and_another(tmp_path):
    class MyTrainer(LoRADATrainer, Seq2SeqTrainer):
        pass

    family = FAMILIES["T5"]
    model, samples = family.make_model(), family.samples(24)
    trainer = MyTrainer(
        model=model,
        args=make_args(tmp_path, Seq2SeqTrainingArguments, max_steps=3, predict_with_generate=True),
        train_dataset=samples,
        eval_dataset=samples[:4],
        data_collator=DataCollatorForSeq2Seq(make_tokenizer(), model=model),
        peft_config=make_lora_config(task_type="SEQ_2_SEQ_LM"),
        da_config=make_config(**EIGHT, step_size=0.1),
    )
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)
    assert trainer.predict(samples[:4], max_new_tokens=5).predictions.ndim == 2  # generated


# dynamo looks at .grad of what it is given, with torch 2.13, seen 2026-11
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "aot_eager",
            marks=[
                pytest.mark.slow,
                pytest.mark.support(
                    "Trainers", "`torch_compile=True`", "the initialisation runs before anything is compiled"
                ),
            ],
        ),
    ],
)
def test_a_compiled_run_starts_where_another_does(tmp_path, lora_model, samples, backend):
    try:
        arguments = {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 3}
        compiled = make_trainer(tmp_path / "compiled", lora_model(), samples, arguments=arguments)
        start = train_from(compiled)
    finally:
        torch.compiler.reset()
    plain = make_trainer(tmp_path / "plain", lora_model(), samples, arguments={"max_steps": 3})
    plain.train()
    assert_initialized(tmp_path / "compiled" / "lora_da", start, compiled.lora_da_report)
    assert_same_tensors(*(written_adapter(tmp_path / which / "lora_da") for which in ("compiled", "plain")))
    found, expected = (adapter_weights(trainer.model) for trainer in (compiled, plain))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


class Trial:
    """As much of optuna's trials as Trainer looks at."""

    def __init__(self, number, params):
        self.number, self.params = number, params


class RatesInTurn(HyperParamSearchBackendBase):
    """A search over two learning rates, one trial each, in the place of optuna's."""

    name = "optuna"
    rates = (1e-3, 1e-2)

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        losses = []
        for number, rate in enumerate(self.rates):
            trainer.train(trial=Trial(number, {"learning_rate": rate}))
            losses.append(trainer.evaluate()["eval_loss"])
        best = min(range(len(losses)), key=losses.__getitem__)
        return BestRun(str(best), losses[best], {"learning_rate": self.rates[best]})


@pytest.fixture
def search_backend(monkeypatch):
    optuna = types.SimpleNamespace(trial=types.SimpleNamespace(BaseTrial=Trial))
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    monkeypatch.setattr(integration_utils, "is_optuna_available", lambda: True)
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, "optuna", RatesInTurn)


@pytest.mark.support(
    "Trainers", "`hyperparameter_search`", "each trial's new model is initialised anew, from the same samples"
)
@pytest.mark.usefixtures("search_backend")
def test_each_trial_of_a_search_is_initialised_anew(tmp_path, tiny_llama, samples):
    starts, models = Starts(), []

    class Watching(LoRADATrainer):
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "lora_da_step_size" in logs:
                models.append(self.model)

    settings = {"model_init": lambda: tiny_llama(), "eval_dataset": samples[:8], "callbacks": [starts]}
    trainer = make_trainer(tmp_path, None, samples, Watching, peft_config=make_lora_config(), **settings)
    best = trainer.hyperparameter_search(hp_space=lambda trial: trial.params, n_trials=2, backend="optuna")
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert len(starts.found) == 2
    assert models[0] is not models[1]
    assert_same_tensors(starts.found[0].weights, starts.found[1].weights)
    assert_made_from_data(starts.found[0].weights, {layer.name: layer.rank for layer in trainer.lora_da_report.layers})
    assert trainer.args.learning_rate == 1e-2
    assert len(trainer.lora_da_report.layers) == LINEAR_LAYERS


class InFloat16(LoRADATrainer):
    """Autocasts to float16 as ``fp16=True`` does on a GPU; on a CPU accelerate ignores that argument."""

    def compute_loss_context_manager(self):
        return torch.autocast("cpu", dtype=torch.float16)


@pytest.mark.support(
    "Trainers",
    "float16 autocast, on the CPU",
    "gradients of the pass are scaled, since float16's range is small; `fp16=True` itself needs a GPU, and is untried",
)
def test_half_precision_in_the_trainer(tmp_path, lora_model, samples):
    half, full = (
        make_trainer(tmp_path / kind.__name__, lora_model(), samples, kind) for kind in (InFloat16, LoRADATrainer)
    )
    for trainer in (half, full):
        start = train_from(trainer)
        assert_initialized(Path(trainer.args.output_dir) / "lora_da", start, trainer.lora_da_report)
    before = [trainer.lora_da_report.search_loss_before for trainer in (half, full)]
    assert before[0] == pytest.approx(before[1], rel=1e-2)
    assert before[0] != before[1]
    after = [trainer.lora_da_report.search_loss_after for trainer in (half, full)]
    assert after[0] == pytest.approx(after[1], rel=5e-2)
