"""The head on the rows of labels: the same statistics from fewer logits, and only where that is known to be so."""

import contextlib
import functools

import pytest
import torch
from families.zoo import FAMILIES
from harness import assert_statistics_equal, collate, initialize, make_args, make_config, make_lora_config, pad_left
from transformers import LlamaForCausalLM

from lora_da_hf import LoRADATrainer


@contextlib.contextmanager
def rows_seen_by(head):
    """Collect the number of rows that the head is given at each call."""
    seen = []
    handle = head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:-1].numel()))
    try:
        yield seen
    finally:
        handle.remove()


LENGTH, NUM_LABELS = 12, 5


def alike_samples(count):
    """Make samples of one length and one number of labels, so that the rows of a batch tell which they are."""
    ids = torch.randint(3, 60, (count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    masked = LENGTH - NUM_LABELS
    return [{"input_ids": i, "attention_mask": [1] * LENGTH, "labels": [-100] * masked + i[masked:]} for i in ids]


def of_labels(seen):
    return [rows for rows in seen if rows % LENGTH]


@pytest.mark.parametrize(
    ("name", "size", "collator"), [("Llama", 1, collate), ("Llama", 4, pad_left), ("GPT-2 (Conv1D)", 4, collate)]
)
@pytest.mark.parametrize("declared", ["auto", "token_mean"])
def test_the_statistics_are_those_of_all_logits(collected, by_autograd, name, size, collator, declared):
    model, samples = FAMILIES[name].make_model(), alike_samples(8)
    with rows_seen_by(model.get_output_embeddings()) as seen:
        _, found = collected(model, samples, batch_size=size, collator=collator, loss_reduction=declared)
    assert of_labels(seen)[-8 // size :] == [size * NUM_LABELS] * (8 // size)
    assert_statistics_equal(found, by_autograd(model, samples), 1e-5)


class OwnTerm(LlamaForCausalLM):
    """A model that adds a term which only logits of all positions fit."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.loss = outputs.loss + (outputs.logits * (labels != -100)[..., None]).square().mean()
        return outputs


def test_a_model_whose_loss_is_not_the_loss_function_s_gets_all_logits(tiny_llama, lora_model):
    base = tiny_llama()
    base.__class__ = OwnTerm
    with rows_seen_by(base.lm_head) as seen:
        initialize(lora_model(model=base), alike_samples(20))
    assert seen
    assert not of_labels(seen)


class ReadsLogits(LoRADATrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert outputs.logits.shape[:2] == inputs["labels"].shape
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("kind", "args", "selects"),
    [(LoRADATrainer, {}, True), (LoRADATrainer, {"label_smoothing_factor": 0.1}, False), (ReadsLogits, {}, False)],
    ids=["stock", "label-smoothing", "overridden"],
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_trainer_uses_it_unless_its_loss_may_read_the_logits(tiny_llama, tmp_path, kind, args, selects, replaced):
    model = tiny_llama()
    trainer = kind(
        model=model,
        args=make_args(tmp_path, **args),
        train_dataset=alike_samples(20),
        data_collator=collate,
        peft_config=make_lora_config(),
        da_config=make_config(batch_size=4),
    )
    if replaced:
        trainer.compute_loss, selects = functools.partial(trainer.compute_loss), False
    with rows_seen_by(model.lm_head) as seen:
        trainer.train()
    assert bool(of_labels(seen)) is selects
