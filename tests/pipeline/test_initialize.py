"""What an initialisation computes, writes and stores, against autograd, dense algebra and the loss itself."""

import random

import pytest
import torch
from harness import (
    EIGHT,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    assert_updates_equal,
    autograd_statistics,
    chosen,
    collate,
    dense_updates,
    factors,
    initialize,
    items_of,
    model_loss,
    relative_error,
    stored_statistics,
    written_updates,
)
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lora_da_hf import LoRADAConfig, load_init

DEFAULT_ROW_NORM = 3**-0.5
"""That PEFT's random rows of A have."""


def token_loss(model, samples):
    """Compute the mean loss over the labels of all samples, one sample at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            batch = collate([sample])
            logits = model.eval()(input_ids=batch["input_ids"]).logits[0, :-1].double()
            labels = batch["labels"][0, 1:]
            total += cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def sample_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[0, :-1], batch["labels"][0, 1:])


# The data


def test_statistics_are_those_of_autograd(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", **EIGHT)
    expected = autograd_statistics(lora_model(), chosen(samples), sample_loss, items_of=items_of(report))
    assert_statistics_equal(stored_statistics(tmp_path / "init"), expected, 2e-5)


@pytest.mark.parametrize("lora", [{}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 8}}])
@pytest.mark.parametrize("settings", [{}, {"layer_steps": "equal"}, {"variance_weight": 0.5, "output_damping": 0.01}])
def test_updates_are_those_of_a_dense_solve(tmp_path, lora_model, samples, settings, lora):
    model = lora_model(**lora)
    report = initialize(model, samples, tmp_path / "init", **EIGHT, **settings)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert_updates_equal(written_updates(model), dense_updates(tmp_path / "init", ranks, report.step_size), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_data_loader_gives_what_its_data_set_and_collator_give(lora_model, samples, batch_size):
    listed, loaded = lora_model(), lora_model()
    first = initialize(listed, samples)
    loader = DataLoader(samples, batch_size=batch_size, collate_fn=collate, shuffle=True)
    second = initialize(loaded, loader, collator=None)
    assert_same_tensors(adapter_weights(loaded), adapter_weights(listed))
    assert second.data_fingerprint == first.data_fingerprint


def test_the_default_collator_pads_like_any_other(lora_model, samples):
    own, other = lora_model(), lora_model()
    initialize(own, samples, collator=None)
    initialize(other, samples)
    assert_same_tensors(adapter_weights(own), adapter_weights(other))


def test_fewer_samples_than_asked_are_used_and_noted(lora_model, samples):
    report = initialize(lora_model(), samples, config=LoRADAConfig())
    assert (report.num_samples, report.num_search_samples, report.num_unseen_samples) == (18, 3, 3)
    assert any("18 samples" in note and "256" in note for note in report.notes)


def test_samples_that_repeat_those_of_the_final_check_are_left_out(lora_model, samples):
    report = initialize(lora_model(), samples * 4, num_samples=40)
    assert report.num_samples < 40
    assert any("samples were left out, since they repeat" in note for note in report.notes)
    few = initialize(lora_model(), samples[:2] * 20, num_samples=24)
    assert any("all samples for unseen repeat others" in note for note in few.notes)


def test_the_same_inputs_give_the_same_bits(lora_model, samples):
    one, two = lora_model(), lora_model()
    first = initialize(one, samples)
    torch.rand(7)
    second = initialize(two, samples)
    assert_same_tensors(adapter_weights(one), adapter_weights(two))
    assert first.search == second.search
    assert initialize(lora_model(), samples, seed=1).data_fingerprint != first.data_fingerprint


class AugmentedSamples(torch.utils.data.Dataset):
    """Samples that are drawn anew whenever they are read."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        shift = int(torch.randint(0, 5, ())) + random.randrange(5)
        sample = self.samples[index]
        return {**sample, "input_ids": [3 + (int(i) + shift) % 20 for i in sample["input_ids"]]}


@pytest.mark.parametrize("kind", [list, AugmentedSamples])
def test_generators_modes_and_gradients_are_as_before(lora_model, samples, kind):
    model = lora_model()
    model.train()
    model.get_base_model().model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    first = initialize(model, kind(samples))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())
    torch.manual_seed(6)
    assert initialize(lora_model(), kind(samples)).data_fingerprint == first.data_fingerprint


def test_dropout_plays_no_part(tiny_llama, lora_model, samples):
    noisy = lora_model(model=tiny_llama(attention_dropout=0.5), lora_dropout=0.5)
    noisy.train()
    assert initialize(noisy, samples).search == initialize(lora_model(), samples).search


# The step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_the_model_and_do_not_rise(tiny_llama, lora_model, samples, dtype):
    model, untouched = (lora_model(model=tiny_llama(dtype=dtype), autocast_adapter_dtype=False) for _ in range(2))
    assert {p.dtype for p in model.parameters()} == {dtype}
    report = initialize(model, iter(samples), population_size=24)
    search, unseen = 12 + report.num_search_samples, report.num_unseen_samples
    before, after = (token_loss(m, samples[12:search]) for m in (untouched, model))
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    assert report.search_loss_before == pytest.approx(before, rel=tolerance)
    assert report.search_loss_after == pytest.approx(after, rel=tolerance)
    assert after < before
    assert unseen > 0
    rest = token_loss(model, samples[search : search + unseen])
    assert report.unseen_loss_after == pytest.approx(rest, rel=tolerance)


def test_the_step_is_the_best_of_those_tried_or_a_shorter_one(lora_model, samples):
    report = initialize(lora_model(), samples)
    losses = dict(report.search)
    assert len(losses) >= 4
    best = min(losses, key=losses.get)
    assert report.step_size <= best
    assert losses[report.step_size] < losses[best] + 0.1 * (report.search_loss_before - losses[best])
    assert report.search_loss_after == pytest.approx(losses[report.step_size], rel=1e-5)
    assert min(losses) < report.step_size < max(losses)


def test_the_update_of_each_layer_is_the_step_times_the_stored_basis(tmp_path, lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, tmp_path / "init")
    bases = load_init(tmp_path / "init").bases
    for name, update in written_updates(model).items():
        assert relative_error(update, report.step_size * bases[name].basis_B @ bases[name].basis_A) < 1e-5
    norms = {name: pytest.approx(update.norm().item(), rel=1e-4) for name, update in written_updates(model).items()}
    assert {layer.name: layer.update_norm for layer in report.layers} == norms


def uphill(model, batch, num_items):
    """Compute the loss with its gradient negated."""
    loss = model_loss(model, batch, num_items)
    return 2 * loss.detach() - loss


def worse_once_written(model, batch, num_items):
    written = any(b.any() for b in factors(adapter_weights(model), "B").values())
    return model_loss(model, batch, num_items) * (10 if written else 1)


@pytest.mark.parametrize("loss", [uphill, worse_once_written])
def test_if_no_step_helps_the_adapter_is_as_peft_made_it_and_the_report_says_so(tmp_path, lora_model, samples, loss):
    model = lora_model()
    fresh = {name: weight.clone() for name, weight in adapter_weights(model).items()}
    before = token_loss(model, samples)
    report = initialize(model, samples, tmp_path / "init", loss=loss)
    found_one = min(tried for _, tried in report.search) < report.search_loss_before
    assert found_one == (loss is worse_once_written)
    assert report.step_size == 0
    assert report.step_size_by_rank[4] == 0
    assert report.search_loss_after == report.search_loss_before
    assert {layer.update_norm for layer in report.layers} == {0.0}
    assert any("B stays zero, as in plain LoRA" in note for note in report.notes)
    torch.testing.assert_close(adapter_weights(model), fresh, rtol=0, atol=0)
    assert token_loss(model, samples) == before
    assert load_init(tmp_path / "init").report.step_size == 0


def test_a_frozen_a_spans_the_subspace_where_no_step_helps(lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, loss=uphill, freeze_a=True)
    assert report.step_size == 0
    weights = adapter_weights(model)
    assert not any(b.any() for b in factors(weights, "B").values())
    for a in factors(weights, "A").values():
        torch.testing.assert_close(a.norm(dim=1), torch.full((4,), DEFAULT_ROW_NORM))


@pytest.mark.parametrize("changes", [(-10.0, 8.0), (-10.0, -8.0)])
def test_a_gain_on_unseen_samples_that_may_be_chance_is_not_taken(lora_model, samples, caplog, changes):
    unseen = dict(zip([tuple(sample["input_ids"]) for sample in chosen(samples, 12)[-2:]], changes, strict=True))

    def loss(model, batch, num_items):
        written = any(b.any() for b in factors(adapter_weights(model), "B").values())
        change = unseen.get(tuple(batch["input_ids"][0].tolist()), 0.0)
        return model_loss(model, batch, num_items) + (change if written else 0.0)

    report = initialize(
        lora_model(), samples, loss=loss, num_samples=8, search_samples=2, batch_size=1, loss_reduction="sample_mean"
    )
    is_chance = changes[1] > 0
    assert (report.step_size == 0) == is_chance
    assert ("which may be chance, so B stays zero, as in plain LoRA" in caplog.text) == is_chance


def test_a_number_is_the_step(lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, step_size=0.25)
    assert (report.step_size, report.search, report.search_loss_before) == (0.25, [], None)
    farthest = max(report.layers, key=lambda layer: layer.displacement_norm).name
    norms = {name: torch.linalg.matrix_norm(update, 2).item() for name, update in written_updates(model).items()}
    assert norms[farthest] == max(norms.values()) == pytest.approx(0.25, rel=1e-3)
    assert min(norms.values()) > 0


def test_stable_gamma_is_the_papers_way_to_say_the_step(tmp_path, lora_model, samples):
    model = lora_model(lora_alpha=8)
    report = initialize(model, samples, tmp_path / "init", step_size=None, stable_gamma=64.0)
    stored = load_init(tmp_path / "init")
    assert report.step_size is stored.report.step_size is None
    for name, update in written_updates(model).items():
        basis = stored.bases[name]
        assert relative_error(update, 2 / 64 * basis.basis_B @ basis.basis_A) < 1e-5


def test_the_papers_preset_splits_by_the_square_root_of_gamma(tmp_path, lora_model, samples):
    model = lora_model()
    initialize(model, samples, tmp_path / "init", config=LoRADAConfig.paper(num_samples=12, input_damping=1e-3))
    weights = adapter_weights(model)
    for name, basis in load_init(tmp_path / "init").bases.items():
        prefix = f"base_model.model.{name}"
        torch.testing.assert_close(weights[f"{prefix}.lora_A.weight"], basis.basis_A / 32)
        torch.testing.assert_close(weights[f"{prefix}.lora_B.weight"], basis.basis_B / 32)


@pytest.mark.parametrize("split", ["default_norm", "orthonormal", "balanced"])
def test_every_split_gives_the_same_product(lora_model, samples, split):
    model, reference = lora_model(), lora_model()
    initialize(model, samples, step_size=0.1, factor_split=split)
    initialize(reference, samples, step_size=0.1)
    assert_updates_equal(written_updates(model), written_updates(reference), 1e-5)
    weights = adapter_weights(model)
    for name, a in factors(weights, "A").items():
        if split == "default_norm":
            torch.testing.assert_close(a.norm(dim=1), torch.full((4,), DEFAULT_ROW_NORM))
        if split == "balanced":
            b = weights[name.replace("lora_A", "lora_B")]
            torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b)[:4], rtol=1e-3, atol=1e-6)


def test_steps_by_layer_are_searched_and_can_be_made_equal(lora_model, samples):
    model, reference = lora_model(), lora_model()
    report = initialize(model, samples)
    equal = initialize(reference, samples, layer_steps="equal")
    expected = written_updates(reference)
    ratios = {name: update.norm() / expected[name].norm() for name, update in written_updates(model).items()}
    for name, update in written_updates(model).items():
        assert relative_error(update, ratios[name] * expected[name]) < 1e-4
    assert max(ratios.values()) > 1.5 * min(ratios.values())
    assert report.step_unit == max(layer.displacement_norm / layer.num_grad_tokens for layer in report.layers)
    assert equal.step_unit == 1


# What is stored


@pytest.mark.parametrize("max_rank", [16, 500])
def test_a_larger_max_rank_is_stored_and_changes_nothing_that_is_written(tmp_path, lora_model, samples, max_rank):
    plain, large = lora_model(), lora_model()
    initialize(plain, samples, tmp_path / "plain", step_size=0.1)
    initialize(large, samples, tmp_path / "large", step_size=0.1, max_rank=max_rank)
    assert_updates_equal(written_updates(large), written_updates(plain), 1e-5)
    for basis in load_init(tmp_path / "large").bases.values():
        assert basis.basis_A.shape[0] == min(max_rank, basis.basis_A.shape[1])
    assert {basis.basis_A.shape[0] for basis in load_init(tmp_path / "plain").bases.values()} == {4}


def test_steps_for_other_ranks_are_searched_for_what_is_stored(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", max_rank=16)
    assert set(report.step_size_by_rank) == {1, 4, 16}
    assert report.step_size_by_rank[4] == report.step_size
    assert all(step > 0 for step in report.step_size_by_rank.values())


# Failure


def mask_at_random(samples):
    """Leave out a random half of the labels, as masked language models do."""
    batch = collate(samples)
    labels = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("memory_budget", [None, 300_000])
def test_a_collator_that_draws_at_random_makes_the_same_batches_for_every_step(lora_model, samples, memory_budget):
    settings = {"collator": mask_at_random, "max_rank": 4}
    report = initialize(lora_model(), samples, memory_budget=memory_budget, **settings)
    again = initialize(lora_model(), samples, **settings)
    assert report.step_size > 0
    assert report.search_loss_after == pytest.approx(dict(report.search)[report.step_size], rel=1e-6)
    assert [layer.eigenvalues for layer in report.layers] == [layer.eigenvalues for layer in again.layers]


def test_a_loss_that_rises_on_unseen_samples_is_a_warning(lora_model, samples, caplog):
    report = initialize(lora_model(), samples, loss=uphill, step_size=1.0)
    assert report.unseen_loss_after > report.unseen_loss_before
    (note,) = (note for note in report.notes if "did not fall" in note)
    assert note in caplog.text
