"""Every family: initialised, trained, saved and loaded again, with statistics that are autograd's."""

import pytest
import torch
from families.zoo import FAMILIES, SPLIT
from harness import (
    EIGHT,
    assert_initialized,
    assert_statistics_equal,
    autograd_statistics,
    chosen,
    items_of,
    make_args,
    make_config,
    model_loss,
    stored_statistics,
    train_from,
    written_adapter,
    written_factors,
)
from peft import PeftModel
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from lora_da_hf import LoRADACallback, LoRADATrainer, load_init, refit_init

QUICK = ("Llama", "GPT-2", "Mixtral", "T5", "BERT, token", "ViT")
ROWS = [
    pytest.param(
        family,
        id=name,
        marks=[
            pytest.mark.support("Families", name, family.describe()),
            *([] if name.startswith(QUICK) else [pytest.mark.slow]),
        ],
    )
    for name, family in FAMILIES.items()
]


def train(family, model, samples, folder):
    """Train three steps with the family's trainer. Returns it, the adapter that it started from, and the report."""
    config = make_config(**EIGHT, step_size=0.1, fit_heads=False)  # the statistics are compared with a fresh model's
    settings = {"model": model, "train_dataset": samples, "data_collator": family.collate}
    if family.trainer is Seq2SeqTrainer:
        callback = LoRADACallback(config)
        args = make_args(folder, Seq2SeqTrainingArguments, max_steps=3)
        trainer = Seq2SeqTrainer(args=args, **settings)
        callback.attach(trainer)
        return trainer, train_from(trainer), callback.report
    trainer = LoRADATrainer(args=make_args(folder, max_steps=3), da_config=config, **settings)
    return trainer, train_from(trainer), trainer.lora_da_report


def outputs(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch)
    return next(found[name] for name in ("start_logits", "logits_per_text", "logits") if name in found)


def assert_made_by(start, state, init):
    """Check that A is the start's in every layer, and that B is zero where it has no step."""
    for name, layer in init.manifest.layers.items():
        lora_A, lora_B = written_factors(state, name, layer.rank)
        torch.testing.assert_close(3**0.5 * lora_A, init.bases[name].basis_A[: layer.rank], atol=1e-4, rtol=0)
        assert lora_B.any() == (start != "inputs"), name


@pytest.mark.parametrize("family", ROWS)
def test_a_family_is_initialised_trained_saved_and_loaded(tmp_path, family):
    samples = family.samples(16)
    trainer, start, report = train(family, family.adapt(), samples, tmp_path)
    assert_initialized(tmp_path / "lora_da", start, report, kept=family.kept)
    for ending, reason in family.kept.items():
        assert any(name.endswith(ending) and reason in why for name, why in report.kept.items()), report.kept
    assert bool(family.single) == (report.batch_size == 1)
    assert any(family.single in note for note in report.notes) or not family.single
    statistics = stored_statistics(tmp_path / "lora_da")
    if family.contrasts:
        assert any(SPLIT in note for note in report.notes)
        assert not any("one sample at a time" in note for note in report.notes)
    else:
        expected = autograd_statistics(
            family.adapt(), chosen(samples), model_loss, family.collate, items_of(report, shifted=family.shifted)
        )
        assert_statistics_equal(statistics, {name: expected[name] for name in statistics}, 1e-4)
    trainer.save_model(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(family.make_model(), tmp_path / "trained")
    stored_start = PeftModel.from_pretrained(family.make_model(), tmp_path / "lora_da")
    batch = family.collate(samples[:4])
    for start in ("gradient", "whitened_gradient", "inputs"):
        refit_init(tmp_path / "lora_da", tmp_path / start, config={"start": start}, step_size=0.1)
        assert torch.isfinite(outputs(PeftModel.from_pretrained(family.make_model(), tmp_path / start), batch)).all()
        assert_made_by(start, written_adapter(tmp_path / start), load_init(tmp_path / start))
    assert torch.equal(outputs(loaded, batch), outputs(trainer.model, batch))
    assert not torch.equal(outputs(stored_start, batch), outputs(loaded, batch))
