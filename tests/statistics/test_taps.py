"""The taps give what autograd gives, whatever the model does between its layers."""

import pytest
import torch
from harness import turn_checkpointing_on
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from lora_da_hf.statistics.model_state import prepared_for_pass


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config)


def tiny_opt(**dropout):
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=96,
            hidden_size=24,
            word_embed_proj_dim=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            init_std=0.2,
            **dropout,
        )
    )


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@pytest.mark.parametrize("make", ["llama", "gpt2", "opt"])
def test_they_give_weight_grad_and_per_token_moments_of_autograd(
    tiny_llama, token_samples, collected, stacked, assert_equal_statistics, make, token_mask
):
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}[make]()
    samples = token_samples(6)
    found = collected(model, samples, batch_size=3, token_mask=token_mask)
    assert_equal_statistics(found.statistics, stacked(model, samples, token_mask=token_mask))
    assert found.result.batch_size == 3


def test_layers_fed_the_same_tensor_share_one_input_sum(tiny_llama, token_samples, collected):
    found = collected(tiny_llama(), token_samples(2))
    sums = {id(tap.input_sum) for tap in found.result.taps.taps.values()}
    assert len(found.statistics) == 14
    assert len(sums) == 8  # in each of two layers: q, k, v; o; gate, up; down
    leaders = {name: leader for name, leader in found.shared.items() if name != leader}
    for layer in ("model.layers.0", "model.layers.1"):
        assert leaders.pop(f"{layer}.self_attn.k_proj") == f"{layer}.self_attn.q_proj"
        assert leaders.pop(f"{layer}.self_attn.v_proj") == f"{layer}.self_attn.q_proj"
        assert leaders.pop(f"{layer}.mlp.up_proj") == f"{layer}.mlp.gate_proj"
    assert not leaders


class Toy(nn.Module):
    """A model with the loss in its hands: tokens to hidden, some layers, tokens from hidden."""

    def __init__(self, *, width=6, vocabulary=96):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def hidden(self, x):
        return self.second(self.first(x).tanh())

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


@pytest.fixture
def toy_collected(collected, monkeypatch):
    """Return ``collected`` for toys, whose labels shift as a causal language model's do."""
    monkeypatch.setitem(collected.__globals__, "shifts_labels", lambda model: True)
    return lambda model, samples, **options: collected(model, samples, compute_loss=toy_loss, **options)


@pytest.mark.parametrize("kind", [Toy, CalledTwice, InPlace, SharedThenApart])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unusual_uses_of_a_layer_give_what_autograd_gives(
    kind, batch_size, token_samples, toy_collected, stacked, assert_equal_statistics
):
    model, samples = kind(), token_samples(5)
    found = toy_collected(model, samples, batch_size=batch_size)
    assert_equal_statistics(found.statistics, stacked(model, samples, compute_loss=toy_loss))
    assert found.result.batch_size == batch_size


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_changes_nothing(
    tiny_llama, token_samples, collected, assert_equal_statistics, make, reentrant
):
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}[make]
    samples = token_samples(5)
    expected = collected(make(), samples, batch_size=2).statistics
    model = make()
    turn_checkpointing_on(model, reentrant=reentrant)
    model.train()
    found = collected(model, samples, batch_size=2)
    assert_equal_statistics(found.statistics, expected, tolerance=1e-6)
    first = next(iter(found.result.taps.taps.values()))
    assert first.forward_calls == 2 * first.backward_calls  # it did recompute


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_in_train_mode(
    tiny_llama, token_samples, collected, stacked, assert_equal_statistics, checkpointing
):
    samples = token_samples(4)
    for model in (
        tiny_llama(attention_dropout=0.5),
        tiny_opt(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, layerdrop=0.5),
    ):
        model.train()
        if checkpointing:
            turn_checkpointing_on(model, reentrant=False)
        found = collected(model, samples, batch_size=2).statistics
        assert_equal_statistics(found, stacked(model, samples))


def captured_moments(model, samples):
    """Return the mean of x x^T over the inputs that the layers of ``model`` really see, in float64."""
    rows = {}
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, name=name: rows.setdefault(name, []).append(args[0].detach().double().squeeze(0))
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    ]
    with prepared_for_pass(model, seed=0), torch.no_grad():
        for sample in samples:
            model(**{key: torch.tensor([value]) for key, value in sample.items()})
    for handle in handles:
        handle.remove()
    return {name: (x := torch.cat(parts)).mT @ x / len(x) for name, parts in rows.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_summed_in_float32(
    tiny_llama, token_samples, collected, assert_equal_statistics, dtype
):
    samples = token_samples(12)
    model = tiny_llama(dtype=dtype)
    found = collected(model, samples).statistics
    assert {getattr(s, f).dtype for s in found.values() for f in ("input_second_moment", "weight_grad")} == {
        torch.float32
    }
    for name, moment in captured_moments(model, samples).items():
        torch.testing.assert_close(found[name].input_second_moment.double(), moment, rtol=1e-5, atol=1e-5)
    exact = collected(tiny_llama(), samples).statistics
    assert_equal_statistics(found, exact, tolerance=0.1 if dtype == torch.bfloat16 else 0.02)


def test_small_gradients_survive_float16(token_samples, toy_collected, assert_equal_statistics):
    """In float16 a gradient below 6e-8 is zero: the pass scales the loss and divides it out again."""

    class Faint(Toy):
        def hidden(self, x):
            return super().hidden(x) * 2**-18

        def forward(self, **batch):
            return super().forward(**batch).float()

    samples = token_samples(4, min_length=12)
    found, exact = (toy_collected(Faint().to(dtype), samples).statistics for dtype in (torch.float16, torch.float64))
    assert_equal_statistics(found, exact, tolerance=0.1)
