import pytest
import torch
from harness import collate, make_learnable_samples
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

from lora_da_hf.errors import DataError
from lora_da_hf.losses import max_sample_length, model_loss, shifts_labels

ENCODER = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def make_bert():
    return BertForSequenceClassification(BertConfig(**ENCODER))


def make_t5():
    return T5(T5Config(vocab_size=96, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))


def make_roberta():
    return RobertaForMaskedLM(RobertaConfig(**ENCODER, pad_token_id=1))


def make_deberta():
    relative = {"relative_attention": True, "position_buckets": 16, "position_biased_input": False}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**ENCODER, **relative))


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, n_positions=32))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_loss_is_a_sum_over_labels_divided_by_the_number_of_items(lora_model, tiny_llama, wrapped):
    model = lora_model() if wrapped else tiny_llama()
    batch = collate(make_learnable_samples(3))
    labels = int((batch["labels"][:, 1:] != -100).sum())
    mean = model_loss(model, batch, None)
    total = model_loss(model, batch, torch.tensor(1))
    torch.testing.assert_close(total, mean * labels)
    torch.testing.assert_close(model_loss(model, batch, torch.tensor(labels)), mean)


def test_a_model_without_a_loss_is_an_error(tiny_llama):
    batch = collate(make_learnable_samples(2))
    del batch["labels"]
    with pytest.raises(DataError, match=r"returned no loss from attention_mask, input_ids. Add labels"):
        model_loss(tiny_llama(), batch, None)


def test_decoders_shift_their_labels_and_others_do_not(tiny_llama, lora_model):
    assert shifts_labels(tiny_llama())
    assert shifts_labels(lora_model())
    assert shifts_labels(make_gpt2())
    assert not shifts_labels(make_t5())
    assert not shifts_labels(make_bert())
    assert not shifts_labels(torch.nn.Linear(2, 2))


def test_the_longest_sample_is_what_the_position_embeddings_allow(tiny_llama):
    assert max_sample_length(tiny_llama()) is None  # rotary
    assert max_sample_length(make_bert()) == 32
    assert max_sample_length(make_gpt2()) == 32
    assert max_sample_length(make_t5()) is None  # relative positions
    assert max_sample_length(make_deberta()) is None  # relative ones, in a table of as many rows
    assert max_sample_length(make_roberta()) == 30  # from the row behind the padding's on
    assert max_sample_length(torch.nn.Linear(2, 2)) is None
