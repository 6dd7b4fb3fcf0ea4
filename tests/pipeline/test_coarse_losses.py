"""A loss in half precision: the search says which steps it cannot tell apart, and guesses none."""

import torch
from harness import collate, make_config, make_learnable_samples

from lora_da_hf import initialize_lora_da
from lora_da_hf.losses import model_loss


def in_bfloat16(model, batch, num_items):
    return model_loss(model, batch, num_items).to(torch.bfloat16)


def test_a_search_says_that_it_cannot_tell_steps_apart(lora_model):
    samples = make_learnable_samples(24)
    settings = {"config": make_config(num_samples=8, search_samples=2), "data_collator": collate, "progress": False}
    report = initialize_lora_da(lora_model(), samples, compute_loss=in_bfloat16, **settings)
    (note,) = [note for note in report.notes if "torch.bfloat16" in note]
    assert "cannot be told apart" in note
    lowest = min(loss for _, loss in [*report.search, (0.0, report.search_loss_before)])
    alike = [step for step, loss in report.search if loss <= lowest + 2**-7 * report.search_loss_before]
    assert report.step_size in (0.0, min(alike))
    assert not any("told apart" in note for note in initialize_lora_da(lora_model(), samples, **settings).notes)
