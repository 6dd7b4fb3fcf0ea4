"""Heads that are new are fitted before anything else, and the fit is kept."""

import random

import pytest
import torch
from harness import collate_classes, initialize, make_config, make_lora_config, once_each
from oracles import collate
from peft import get_peft_model
from torch.nn.functional import cosine_similarity
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lora_da_hf import apply_init
from lora_da_hf.samples import choose_samples, pad_samples

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
SETTINGS = {"num_samples": 16, "search_samples": 4, "batch_size": 4}


def classes(count, of=lambda ids: ids[-1] % 3):
    return [{**sample, "labels": of(sample["input_ids"])} for sample in once_each(count)]


def collate_numbers(samples):
    return {**collate_classes(samples), "labels": torch.tensor([float(sample["labels"]) for sample in samples])}


def llama(**overrides):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "num_labels": 3, "pad_token_id": 0, **overrides})
    return get_peft_model(
        LlamaForSequenceClassification(config).to(config.dtype or torch.float32), make_lora_config(task_type="SEQ_CLS")
    )


def roberta():
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, num_labels=3, pad_token_id=0, max_position_embeddings=40)
    return get_peft_model(RobertaForSequenceClassification(config), make_lora_config(task_type="SEQ_CLS"))


def tagger():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=3, max_position_embeddings=40)
    lora = make_lora_config(task_type="TOKEN_CLS", target_modules=["query", "value"])
    return get_peft_model(BertForTokenClassification(config), lora)


def tagged(count):
    return [{**s, "labels": [token % 3 for token in s["input_ids"]]} for s in once_each(count)]


def images():
    torch.manual_seed(0)
    small = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    model = ViTForImageClassification(ViTConfig(**small, num_labels=2, image_size=16, patch_size=8))
    lora = make_lora_config(target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, lora)


def bright_and_dark(count):
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(3, 16, 16, generator=generator) + number % 2 for number in range(count)]
    return [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(pixels)]


def regression():
    return llama(num_labels=1, problem_type="regression")


CASES = {
    "classes": (llama, classes, collate_classes),
    "two layers": (roberta, lambda count: classes(count, lambda ids: ids[0] % 3), collate_classes),
    "tokens": (tagger, tagged, collate),
    "bfloat16": (lambda: llama(dtype=torch.bfloat16), classes, collate_classes),
    "images": (images, bright_and_dark, pad_samples),
    "numbers": (regression, lambda count: classes(count, lambda ids: ids[-1] / 10), collate_numbers),
}


def heads(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".modules_to_save." in name}


def mean_loss(model, samples, collator):
    model.eval()
    return model(**collator(samples)).loss


@pytest.mark.parametrize("case", CASES)
def test_a_new_head_is_fitted_and_the_rest_stays(case):
    make, make_samples, collator = CASES[case]
    model, samples = make(), make_samples(160)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        first = mean_loss(model, samples, collator)
    report = initialize(model, samples, collator=collator, **SETTINGS)
    assert any("was fitted first, on 48 samples" in note for note in report.notes)
    for name, parameter in model.named_parameters():
        kept = "lora_" in name or ".modules_to_save." in name
        assert kept or torch.equal(parameter, before[name]), name
    assert all(not torch.equal(head, before[name]) for name, head in heads(model).items())
    with torch.no_grad(), model.disable_adapter():
        unfitted = mean_loss(model, samples, collator)
    assert unfitted.item() == pytest.approx(first.item(), rel=1e-5)  # PEFT's original head is left alone
    assert report.search_loss_before < first


def test_the_fitted_head_is_at_the_minimum_of_the_loss_and_a_ridge():
    model, samples, name = llama(), classes(160), "base_model.model.score.modules_to_save.default.weight"
    start = heads(model)[name]
    report = initialize(model, samples, collator=collate_classes, step_size=1e-6, **SETTINGS)
    options = {"seed": 42, "has_one_label": lambda sample: True, "with_heads": True}
    drawn = choose_samples(samples, make_config(step_size=1e-6, **SETTINGS), **options).heads
    fitted = [sample for place, sample in enumerate(drawn) if place % 4 != 1]
    assert f"on {len(fitted)} samples" in report.notes[0]
    weight = dict(model.named_parameters())[name].requires_grad_(True)
    gradient = torch.autograd.grad(mean_loss(model, fitted, collate_classes), weight)[0]
    # there the gradient is that of the ridge, and points to where the head began
    assert cosine_similarity(-gradient.flatten(), (weight - start).flatten(), dim=0) > 0.99


def test_without_fit_heads_the_head_stays():
    model = llama()
    before = heads(model)
    report = initialize(model, classes(160), collator=collate_classes, fit_heads=False, **SETTINGS)
    assert not any("fitted" in note for note in report.notes)
    assert all(torch.equal(head, before[name]) for name, head in heads(model).items())


def test_a_head_that_nothing_is_to_be_learnt_for_stays():
    model, generator = llama(), random.Random(0)
    before = heads(model)
    samples = [{**sample, "labels": generator.randrange(3)} for sample in once_each(160)]
    report = initialize(model, samples, collator=collate_classes, **SETTINGS)
    assert any("score was not fitted first" in note for note in report.notes)
    assert all(torch.equal(head, before[name]) for name, head in heads(model).items())


def test_a_failure_puts_the_head_back():
    model = llama()
    before = heads(model)

    def fails_once_fitted(model, batch, num_items):
        if any(not torch.equal(head, before.get(name, head)) for name, head in heads(model).items()):
            raise RuntimeError("late")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="late"):
        initialize(model, classes(160), collator=collate_classes, loss=fails_once_fitted, **SETTINGS)
    assert all(torch.equal(head, before[name]) for name, head in heads(model).items())


def test_the_fitted_head_is_stored_and_found_again(tmp_path):
    samples = classes(160)
    first = llama()
    initialize(first, samples, tmp_path / "init", collator=collate_classes, **SETTINGS)
    again = llama()
    report = initialize(again, samples, tmp_path / "init", collator=collate_classes, **SETTINGS)
    assert any(note.startswith("reusing") for note in report.notes)
    other = llama()
    for parameter in other.get_base_model().score.modules_to_save["default"].parameters():
        torch.nn.init.normal_(parameter)
    apply_init(other, tmp_path / "init", progress=False)
    for model in (again, other):
        assert all(torch.equal(a, b) for a, b in zip(heads(model).values(), heads(first).values(), strict=True))
