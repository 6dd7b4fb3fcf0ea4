"""The head on the rows of labels: the same statistics from fewer logits, and only where that is known to be so."""

import contextlib
import functools

import pytest
import torch
from harness import (
    assert_statistics_equal,
    autograd_statistics,
    chosen,
    make_args,
    make_config,
    make_lora_config,
    pad_left,
    turn_checkpointing_on,
)
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_da_hf import LoRADATrainer, initialize_lora_da
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.losses import make_labelled_head, model_loss
from lora_da_hf.samples import pad_samples

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def make_gemma2():
    """Make a model that caps its logits."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


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
    ("make", "batch_size", "collate"),
    [
        (None, 1, pad_samples),
        (None, 4, pad_samples),
        (None, 4, pad_left),
        (make_gpt2, 4, pad_samples),
        (make_gemma2, 4, pad_samples),
    ],
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(
    tiny_llama, token_samples, collected, assert_equal_statistics, stacked, reentrant
):
    model, samples = tiny_llama(), token_samples(6)
    expected = stacked(model, samples)
    turn_checkpointing_on(model, reentrant=reentrant)
    model.train()
    found = collected(model, samples, batch_size=3, labelled_head=True)
    assert_equal_statistics(found.statistics, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tiny_llama, token_samples, fails):
    model = tiny_llama()
    before = dict(vars(model))
    with contextlib.suppress(ZeroDivisionError), make_labelled_head(model).rows_of_labels():
        model(**pad_samples(token_samples(2)))
        if fails:
            raise ZeroDivisionError
    assert dict(vars(model)) == before
    assert not model._forward_pre_hooks
    assert not model.lm_head._forward_pre_hooks


def test_a_loss_function_of_the_users_is_put_back(tiny_llama):
    model = tiny_llama()
    model.loss_function = stock = model.loss_function
    with make_labelled_head(model).rows_of_labels():
        assert model.loss_function is not stock
    assert vars(model)["_loss_function"] is stock


def test_passes_without_labels_or_with_a_selection_of_their_own_are_left_alone(tiny_llama, token_samples):
    model, batch = tiny_llama(), pad_samples(token_samples(2))
    labels = batch.pop("labels")
    head = make_labelled_head(model)
    with head.rows_of_labels():
        assert model(**batch).logits.shape[:2] == labels.shape
        assert model(**batch, labels=labels[:, -2:], logits_to_keep=2).logits.shape[:2] == (2, 2)
        assert model(**batch, labels=labels, shift_labels=labels).logits.shape[:2] == labels.shape
        assert model(**batch, labels=torch.full_like(labels, -100)).logits.shape[:2] == labels.shape
        assert head.num_calls == 0


def test_models_of_which_it_is_not_known_have_none(tiny_llama, lora_model):
    assert make_labelled_head(BertForMaskedLM(BertConfig(**SIZES, intermediate_size=48))) is None
    with_own_loss = tiny_llama()
    with_own_loss.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    assert make_labelled_head(with_own_loss) is None
    assert make_labelled_head(lora_model(target_modules=["lm_head", "q_proj"])) is None
    assert make_labelled_head(torch.nn.Linear(2, 2)) is None
    assert make_labelled_head(lora_model()) is not None


# ---- the whole initialisation


def initialize(model, folder=None, **arguments):
    """Initialise; return the samples of the statistics, and the rows that the head was given in each pass."""
    samples = alike_samples(20)
    config = make_config(save_statistics=folder is not None, batch_size=4)
    with rows_seen_by(model.get_base_model().get_output_embeddings()) as seen:
        report = initialize_lora_da(
            model, samples, config=config, data_collator=pad_samples, output_dir=folder, progress=False, **arguments
        )
    return chosen(samples, report.num_samples, 20), seen


def of_labels(seen):
    return [rows for rows in seen if rows % LENGTH]


def test_the_stored_statistics_are_those_of_autograd(lora_model, tmp_path):
    used, seen = initialize(lora_model(), tmp_path / "init")
    assert len(of_labels(seen)) > len(seen) / 3
    stored = load_init(tmp_path / "init")
    expected = autograd_statistics(lora_model(), used, lambda model, batch: model_loss(model, batch, None))
    assert_statistics_equal(load_statistics(stored.folder, stored.manifest), expected, 1e-5)


def with_term_of_all_logits(model, batch, num_items):
    """Compute the model's loss and a term that the positions without a label are in."""
    outputs = model(**batch)
    return outputs.loss + outputs.logits.square().mean()


class TermOfAllLogits(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


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


@pytest.mark.parametrize("kind", [TermOfAllLogits, OwnLoss, OwnTerm])
def test_a_model_whose_loss_is_not_the_loss_function_s_gets_all_logits(tiny_llama, lora_model, kind):
    base = tiny_llama()
    base.__class__ = kind
    _, seen = initialize(lora_model(model=base))
    assert seen
    assert not of_labels(seen)


def test_a_loss_of_the_users_gets_all_logits(lora_model):
    _, seen = initialize(lora_model(), compute_loss=with_term_of_all_logits)
    assert seen
    assert not of_labels(seen)


class HeadByKeyword(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = self.lm_head(input=hidden)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_head_that_is_called_by_keyword_makes_all_logits(tiny_llama, lora_model):
    base = tiny_llama()
    base.__class__ = HeadByKeyword
    _, seen = initialize(lora_model(model=base))
    assert seen
    assert not of_labels(seen)


def trainer_of(kind, model, folder, **args):
    return kind(
        model=model,
        args=make_args(folder, **args),
        train_dataset=alike_samples(20),
        data_collator=pad_samples,
        peft_config=make_lora_config(),
        da_config=make_config(save_statistics=True, batch_size=4),
    )


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
    trainer = trainer_of(kind, model, tmp_path, **args)
    if replaced:
        trainer.compute_loss, selects = functools.partial(trainer.compute_loss), False
    with rows_seen_by(model.lm_head) as seen:
        trainer.train()
    assert bool(of_labels(seen)) is selects
