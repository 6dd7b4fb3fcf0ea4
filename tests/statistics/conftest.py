"""The statistics of a plain model, as an initialisation stores them, and autograd's."""

import contextlib

import pytest
from harness import autograd_statistics, initialize, make_lora_config, model_loss, stored_statistics
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


@contextlib.contextmanager
def adapted(model):
    """Put adapters on every linear layer but the head, and take them off again."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n}
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    peft_model = get_peft_model(model, make_lora_config(target_modules=list(layers), fan_in_fan_out=transposed))
    yield peft_model
    peft_model.unload()


@pytest.fixture
def collected(tmp_path):
    """Return ``collected(model, samples, **settings) -> (report, statistics by layer)``; all samples are used."""

    def collect(model, samples, **settings):
        folder = tmp_path / f"init_{len(list(tmp_path.iterdir()))}"
        fixed = {"num_samples": len(samples), "search_samples": 0, "step_size": 0.1, "save_statistics": True}
        with adapted(model) as peft_model:
            report = initialize(peft_model, samples, folder, **{"batch_size": 1, **fixed, **settings})
        return report, stored_statistics(folder)

    return collect


@pytest.fixture
def by_autograd():
    """Return ``by_autograd(model, samples, *, loss, mean_of="labels", token_mask)``, for models that shift labels."""

    def compute(model, samples, *, loss=model_loss, mean_of="labels", token_mask="attention"):
        def items_of(batch):
            return int((batch["labels"][:, 1:] != -100).sum()) if mean_of == "labels" else 1

        with adapted(model) as peft_model:
            return autograd_statistics(
                peft_model,
                samples,
                lambda model, batch: loss(model, batch, None),
                items_of=items_of,
                token_mask=token_mask,
            )

    return compute
