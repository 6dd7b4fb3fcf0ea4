"""The head on the rows of labels: the same statistics from fewer logits, and only where that is known to be so."""

import contextlib
import functools

import pytest
import torch
from harness import make_args, make_config, make_lora_config, pad_left
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lora_da_hf import LoRADATrainer, initialize_lora_da
from lora_da_hf.samples import pad_samples


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))


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
    ids = torch.randint(3, 96, (count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    masked = LENGTH - NUM_LABELS
    return [{"input_ids": i, "attention_mask": [1] * LENGTH, "labels": [-100] * masked + i[masked:]} for i in ids]


def num_labels(samples):
    return sum(label != -100 for sample in samples for label in sample["labels"][1:])


@pytest.mark.parametrize(
    ("make", "batch_size", "collate"), [(None, 1, pad_samples), (None, 4, pad_left), (make_gpt2, 4, pad_samples)]
)
@pytest.mark.parametrize("declared", ["auto", "token_mean"])
def test_the_statistics_are_those_of_all_logits(
    tiny_llama, token_samples, collected, stacked, assert_equal_statistics, make, batch_size, collate, declared
):
    model, samples = make() if make else tiny_llama(), token_samples(9)
    head = model.get_output_embeddings()
    batches = []
    with rows_seen_by(head) as seen:
        found = collected(
            model,
            samples,
            batch_size=batch_size,
            collate=collate,
            declared=declared,
            labelled_head=True,
            on_samples=lambda count: batches.append(len(seen)),
        )
    assert sum(seen[batches[0] - 1 :]) == num_labels(samples)
    assert_equal_statistics(found.statistics, stacked(model, samples))


def of_labels(seen):
    return [rows for rows in seen if rows % LENGTH]


class OwnLoss(LlamaForCausalLM):
    """A model that makes its loss itself, as those with code of their own do, though it has a loss function too."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        logits, following = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        outputs.loss = cross_entropy(logits, following)
        return outputs


class OwnTerm(LlamaForCausalLM):
    """A model that adds a term which only logits of all positions fit."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.loss = outputs.loss + (outputs.logits * (labels != -100)[..., None]).square().mean()
        return outputs


@pytest.mark.parametrize("kind", [OwnLoss, OwnTerm])
def test_a_model_whose_loss_is_not_the_loss_function_s_gets_all_logits(tiny_llama, lora_model, kind):
    base = tiny_llama()
    base.__class__ = kind
    with rows_seen_by(base.lm_head) as seen:
        initialize_lora_da(
            lora_model(model=base), alike_samples(20), config=make_config(), data_collator=pad_samples, progress=False
        )
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
        data_collator=pad_samples,
        peft_config=make_lora_config(),
        da_config=make_config(batch_size=4),
    )
    if replaced:
        trainer.compute_loss, selects = functools.partial(trainer.compute_loss), False
    with rows_seen_by(model.lm_head) as seen:
        trainer.train()
    assert bool(of_labels(seen)) is selects
