"""How often the host would wait for a GPU: not once more for each layer, and once for each layer of experts."""

import pytest
import torch
import transformers as tf
from families.zoo import DECODER, EXPERTS
from harness import initialize, make_lora_config
from peft import get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "unique", "masked_select", "__bool__", "__int__")
WAITS = {getattr(holder, name) for holder in (Tensor, torch) for name in NAMES if hasattr(holder, name)}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class Waits(TorchFunctionMode):
    """Counts what needs a value of a tensor to go on."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        index = args[1] if func in INDEXING else None
        masks = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, Tensor)]
        self.count += func in WAITS or any(mask.dtype == torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


def waits_of_a_batch(kind, config, samples, lora):
    """Return the waits of a whole initialisation with four batches, less those of one with two, for each batch."""
    counts = []
    for num_samples in (8, 16):
        torch.manual_seed(0)
        model = get_peft_model(kind(config), make_lora_config(**lora))
        with Waits() as waits:
            initialize(model, samples, num_samples=num_samples, search_samples=0, step_size=0.1, batch_size=4)
        counts.append(waits.count)
    return (counts[1] - counts[0]) / 2


@pytest.mark.parametrize(
    ("kind", "config", "lora", "each"),
    [
        (tf.LlamaForCausalLM, tf.LlamaConfig, {}, 0),
        (tf.MixtralForCausalLM, tf.MixtralConfig, {**EXPERTS, "lora_dropout": 0.0}, 1),
    ],
)
def test_nothing_waits_for_a_layer_and_its_experts_wait_once(kind, config, lora, each, token_samples):
    samples = token_samples(24)
    shape = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96}
    few, many = (
        waits_of_a_batch(kind, config(**{**shape, "num_hidden_layers": layers}), samples, lora) for layers in (2, 5)
    )
    assert few > 0
    assert many - few == 3 * each
