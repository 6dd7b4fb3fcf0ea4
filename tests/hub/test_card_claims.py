"""What a card says of ranks, of the base's weights, of step 0 and of losses is so for the initialisation it is of."""

import dataclasses

import pytest
import torch
import yaml
from conftest import make_lora_model
from harness import collate, forge_manifest, make_config, make_learnable_samples, store_init

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ConfigError
from lora_da_hf.hub import list_inits
from lora_da_hf.hub.cards import render_card
from lora_da_hf.losses import model_loss

FURTHER = "on a version of the base that was trained further"
NO_OP = "the adapter is a no-op at step 0"
NOT_A_NO_OP = "The adapter is not a no-op at step 0"


@pytest.mark.parametrize(
    ("lora", "max_rank", "largest"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}}, 4, 4),
        ({"target_modules": ["q_proj", "down_proj"]}, 64, 64),  # q_proj has 48 inputs, and all its directions are there
    ],
    ids=["a layer with more", "a narrow layer"],
)
def test_the_largest_rank_is_one_that_every_layer_can_have(hub, push, pull, tmp_path, lora, max_rank, largest):
    folder = store_init(
        tmp_path / "init", make_lora_model(**lora), max_rank=max_rank, save_statistics=False, step_size=0.1
    )
    card = render_card(load_init(folder), license=None)
    assert f"any rank up to {largest} can be used" in card
    assert f"at any rank up to {largest}." in card
    assert yaml.safe_load(card.split("---\n")[1])["lora_da"]["max_rank"] == largest
    push(folder, card=card)
    assert [found.rank for found in list_inits(endpoint=hub.endpoint, token="hf_alice")] == [largest]
    hub.log.clear()
    with pytest.raises(ConfigError, match=f"rank={largest + 1} cannot be taken .* ask for one from 1 to {largest}"):
        pull(rank=largest + 1)
    assert not hub.seen(server="storage")
    layers = load_init(pull(rank=largest).folder).manifest.layers.values()
    assert all(layer.rank == min(largest, layer.in_features) for layer in layers)


def test_a_base_without_a_fingerprint_is_not_said_to_be_told_from_one_that_was_trained_further(init):
    assert FURTHER in render_card(load_init(init), license=None)
    base = load_init(init).manifest.base_model
    forge_manifest(init, base_model={**base, "weights_sha256": None})
    card = render_card(load_init(init), license=None)
    assert "The weights have no fingerprint" in card
    assert FURTHER not in card


def test_an_adapter_with_a_step_of_0_is_said_to_be_a_no_op(init, tmp_path):
    def without_a_step_that_helps(model, batch, count):
        loss = model_loss(model, batch, count)
        return loss if torch.is_grad_enabled() else 20 - loss

    initialize_lora_da(
        make_lora_model(target_modules=["q_proj"]),
        make_learnable_samples(24),
        config=make_config(),
        data_collator=collate,
        compute_loss=without_a_step_that_helps,
        output_dir=tmp_path / "still",
        progress=False,
    )
    still = load_init(tmp_path / "still")
    assert still.report.step_size == 0
    card, other = render_card(still, license=None), render_card(load_init(init), license=None)
    assert (NO_OP in card, NOT_A_NO_OP in card) == (True, False)
    assert (NO_OP in other, NOT_A_NO_OP in other) == (False, True)


@pytest.mark.parametrize(
    ("before", "after", "change"), [(-1.0, -2.0, "-100.0 %"), (-2.0, -1.0, "+50.0 %"), (2.0, 1.5, "-25.0 %")]
)
def test_a_loss_that_falls_is_said_to_fall_whatever_its_sign(init, before, after, change):
    stored = load_init(init)
    losses = {"num_unseen_samples": 3, "unseen_loss_before": before, "unseen_loss_after": after}
    changed = dataclasses.replace(stored, report=dataclasses.replace(stored.report, **losses))
    assert f"({change})" in render_card(changed, license=None)
