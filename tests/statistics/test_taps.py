"""The taps give what autograd gives, whatever the model does between its layers."""

import pytest
import torch
from families.zoo import FAMILIES
from harness import assert_statistics_equal, relative_error
from torch import nn
from torch.nn import functional


@pytest.mark.parametrize("name", ["Llama", "GPT-2 (Conv1D)", "OPT"])
def test_the_rows_that_predict_a_label_can_be_counted_alone(token_samples, collected, by_autograd, name):
    model, samples = FAMILIES[name].make_model(), token_samples(6, vocabulary=60)
    _, found = collected(model, samples, batch_size=3, token_mask="labels")
    assert_statistics_equal(found, by_autograd(model, samples, token_mask="labels"), 1e-5)


class Toy(nn.Module):
    """A model with the loss in its hands: tokens to hidden, some layers, tokens from hidden."""

    loss_type = "ForCausalLM"  # its labels shift

    def __init__(self, *, width=6, vocabulary=96):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels, attention_mask=None, num_items_in_batch=None):
        logits = self.lm_head(self.hidden(self.embed(input_ids)))
        targets = functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum")
        return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class CalledTwice(Toy):
    def hidden(self, x):
        return self.second(self.first(self.first(x).tanh()).tanh())


class InPlace(Toy):
    def hidden(self, x):
        hidden = self.first(x)
        hidden.mul_(2.0).relu_()
        output = self.second(hidden)
        output += x
        return output


class SharedThenApart(Toy):
    """Both layers are fed one tensor, and then the first of them another one."""

    def hidden(self, x):
        y = self.first(x) + self.second(x)
        return self.first(y.tanh())


def toy_loss(model, batch, num_items):
    return model(**batch, num_items_in_batch=num_items)


@pytest.mark.parametrize("kind", [CalledTwice, InPlace, SharedThenApart])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unusual_uses_of_a_layer_give_what_autograd_gives(kind, batch_size, token_samples, collected, by_autograd):
    model, samples = kind(), token_samples(5)
    report, found = collected(model, samples, batch_size=batch_size, loss=toy_loss)
    assert_statistics_equal(found, by_autograd(model, samples, loss=toy_loss), 1e-5)
    assert report.batch_size == batch_size


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_half_precision_model_is_summed_in_float32(
    tiny_llama, token_samples, collected, by_autograd, dtype, tolerance
):
    samples = token_samples(12)
    model = tiny_llama(dtype=dtype)
    _, found = collected(model, samples)
    assert {s.input_second_moment.dtype for s in found.values()} == {torch.float32}
    for name, layer in by_autograd(model, samples).items():
        assert relative_error(found[name].input_second_moment, layer.input_second_moment) < 1e-5
    assert_statistics_equal(found, by_autograd(tiny_llama(), samples), tolerance)
