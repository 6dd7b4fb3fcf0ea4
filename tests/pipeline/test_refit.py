import dataclasses
import re
import shutil

import pytest
import torch
from families.zoo import FAMILIES, send_nothing_to_the_last_expert
from harness import (
    adapter_weights,
    assert_same_tensors,
    assert_updates_equal,
    dense_updates,
    factors,
    relative_error,
    store_init,
    written_adapter,
    written_factors,
    written_updates,
)
from peft import PeftConfig, PeftModel

from lora_da_hf import LoRADAConfig, apply_init, refit_init
from lora_da_hf.artifacts.manifest import MANIFEST_FILE, RefittedFrom
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ArtifactError, ConfigError

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def without_statistics(tmp_path_factory):
    from conftest import make_lora_model

    folder = tmp_path_factory.mktemp("bare") / "init"
    return store_init(folder, make_lora_model(r=8, use_rslora=True), save_statistics=False)


def changed(folder, **settings):
    """Return the stored settings with others in their place."""
    return dataclasses.replace(load_init(folder).manifest.config, **settings)


def loaded(folder, tiny_llama):
    """Load a folder's adapter as anybody would, with PEFT."""
    return PeftModel.from_pretrained(tiny_llama(), folder)


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]


def assert_one_scaling(folder, base, scaling):
    """Check with PEFT that all layers have one scaling, which r and lora_alpha alone tell, and return its config."""
    config = PeftConfig.from_pretrained(folder)
    alone = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    layers = lora_layers(PeftModel.from_pretrained(base, folder))
    assert [alone, *(layer.scaling["default"] for layer in layers)] == pytest.approx([scaling] * (len(layers) + 1))
    assert config.r == max(layer.r["default"] for layer in layers)
    return config


def ranks_of(folder):
    return {name: layer.rank for name, layer in load_init(folder).manifest.layers.items()}


# Another rank


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_another_rank_needs_no_statistics_and_loads_with_peft(without_statistics, tmp_path, tiny_llama, rank):
    refitted = refit_init(without_statistics, tmp_path / "new", rank=rank, step_size=0.05)
    assert set(ranks_of(tmp_path / "new").values()) == {rank}
    bases = load_init(without_statistics).bases
    expected = {
        name: 0.05 * (basis.basis_B[:, :rank].double() @ basis.basis_A[:rank].double()).numpy()
        for name, basis in bases.items()
    }
    model = loaded(tmp_path / "new", tiny_llama)
    assert_updates_equal(written_updates(model), expected)
    assert {layer.peft_scaling for layer in refitted.manifest.layers.values()} == {16 / rank**0.5}
    config = PeftConfig.from_pretrained(tmp_path / "new")
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (rank, 16, {}, {})
    assert all(torch.equal(refitted.bases[name].basis_B, bases[name].basis_B) for name in bases)


def test_what_was_cut_can_be_used_at_any_stored_rank_all_the_same(stored_init, tmp_path, lora_model):
    folder = refit_init(stored_init, tmp_path / "new", rank=2).folder
    models = [lora_model(r=8), lora_model(r=8)]
    steps = [
        apply_init(model, source, step_size=0.1) for model, source in zip(models, (stored_init, folder), strict=True)
    ]
    assert_same_tensors(*map(adapter_weights, models))
    assert steps[0].step_size_by_rank == steps[1].step_size_by_rank


def test_a_layer_with_fewer_directions_gets_all_of_them(tmp_path, lora_model, tiny_llama):
    small = tiny_llama(hidden_size=16, intermediate_size=40)
    folder = store_init(tmp_path / "init", lora_model(model=small, r=8), max_rank=24)
    refit_init(folder, tmp_path / "new", rank=20)
    ranks = ranks_of(tmp_path / "new")
    assert {name for name, rank in ranks.items() if rank == 20} == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
    assert set(ranks.values()) == {16, 20}
    assert_one_scaling(tmp_path / "new", tiny_llama(hidden_size=16, intermediate_size=40), 16 / 20)
    model = PeftModel.from_pretrained(tiny_llama(hidden_size=16, intermediate_size=40), tmp_path / "new")
    expected = dense_updates(folder, ranks, load_init(tmp_path / "new").report.step_size)
    assert_updates_equal(written_updates(model), expected)


def test_layers_left_to_peft_keep_their_tensors_and_rank_at_the_scaling_of_all(tmp_path, lora_model, tiny_llama):
    model = lora_model(r=4, lora_alpha=8, rank_pattern={"o_proj": 50}, alpha_pattern={"o_proj": 100})
    folder = store_init(tmp_path / "init", model)
    before = written_adapter(folder)
    refit_init(folder, tmp_path / "new", rank=2)
    after = written_adapter(tmp_path / "new")
    kept = {name for name in before if "o_proj" in name}
    assert_same_tensors({name: after[name] for name in kept}, {name: before[name] for name in kept})
    config = assert_one_scaling(tmp_path / "new", tiny_llama(), 4.0)
    assert config.r == 50
    assert config.rank_pattern["^" + re.escape(QUERY)] == 2
    again = refit_init(tmp_path / "new", tmp_path / "newer", rank=4)
    assert {layer.peft_scaling for layer in again.report.layers} == {2.0}
    assert again.report.kept == load_init(folder).report.kept


def test_the_dtype_of_the_stored_adapter_stays(tmp_path, lora_model, tiny_llama):
    model = lora_model(model=tiny_llama(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    folder = store_init(tmp_path / "init", model)
    refit_init(folder, tmp_path / "new", rank=2)
    assert {tensor.dtype for tensor in written_adapter(tmp_path / "new").values()} == {torch.bfloat16}


def test_a_rank_above_the_stored_one_is_an_error(stored_init, tmp_path):
    with pytest.raises(ConfigError, match=r"q_proj: rank 17 is above the stored 16. Ask for a smaller one; or, if"):
        refit_init(stored_init, tmp_path / "new", rank=17)
    with pytest.raises(ConfigError, match="give a rank of at least 1"):
        refit_init(stored_init, tmp_path / "new", rank=0)
    assert not (tmp_path / "new").exists()


# Other settings


@pytest.mark.parametrize(
    "settings",
    [
        {"input_damping": 1e-2, "output_damping": "0.3*mean"},
        {"variance_weight": 0.5},
        {"layer_steps": "equal", "step_size": 0.05},
        {"factor_split": "balanced", "layer_steps": "equal", "step_size": 0.05},
    ],
)
def test_other_settings_from_statistics_give_what_a_dense_solve_gives(stored_init, tmp_path, tiny_llama, settings):
    config = changed(stored_init, **settings)
    refitted = refit_init(stored_init, tmp_path / "new", config=config, rank=3)
    step = refitted.report.step_size
    expected = dense_updates(stored_init, dict.fromkeys(refitted.bases, 3), step, config)
    assert_updates_equal(written_updates(loaded(tmp_path / "new", tiny_llama)), expected)
    before = dense_updates(stored_init, {QUERY: 3}, step)[QUERY]
    assert abs(expected[QUERY] - before).max() > 1e-4 * abs(before).max()
    assert refitted.manifest.config == dataclasses.replace(config, save_statistics=True)


def test_a_larger_rank_than_the_stored_one_is_solved_from_statistics(stored_init, tmp_path, lora_model):
    refitted = refit_init(stored_init, tmp_path / "new", config=changed(stored_init, max_rank=30), rank=25)
    assert {basis.basis_A.shape[0] for basis in refitted.bases.values()} == {30}
    ranks = ranks_of(tmp_path / "new")
    assert set(ranks.values()) == {25}
    model = lora_model(r=25)
    apply_init(model, tmp_path / "new", step_size=0.1)
    assert_updates_equal(written_updates(model), dense_updates(stored_init, ranks, 0.1))


def test_settings_of_the_write_need_no_statistics(without_statistics, tmp_path):
    config = changed(without_statistics, factor_split="orthonormal", step_size=0.02)
    refitted = refit_init(without_statistics, tmp_path / "new", config=config)
    assert (refitted.report.step_size, refitted.report.step_size_by_rank) == (0.02, {})
    rows = [row.norm().item() for a in factors(written_adapter(tmp_path / "new"), "A").values() for row in a]
    assert rows == pytest.approx([(0.02 / (16 / 8**0.5)) ** 0.5] * len(rows), rel=1e-5)
    assert set(ranks_of(tmp_path / "new").values()) == {8}


def test_settings_of_the_solve_need_statistics(without_statistics, tmp_path):
    with pytest.raises(ArtifactError, match="save_statistics=True"):
        refit_init(without_statistics, tmp_path / "new", config=changed(without_statistics, variance_weight=0.5))
    with pytest.raises(ArtifactError, match=r"has no statistics to take along. Leave save_statistics out"):
        refit_init(without_statistics, tmp_path / "new", config=changed(without_statistics, save_statistics=True))
    assert not (tmp_path / "new").exists()


def test_settings_of_the_pass_cannot_be_changed(stored_init, tmp_path):
    with pytest.raises(ConfigError, match="token_mask='labels'"):
        refit_init(stored_init, tmp_path / "new", config=LoRADAConfig(token_mask="labels"))


def test_a_searched_step_is_carried_over_with_a_note_and_never_between_units(stored_init, tmp_path, lora_model):
    config = changed(stored_init, input_damping=1e-2)
    refitted = refit_init(stored_init, tmp_path / "new", config=config)
    assert refitted.report.step_size == load_init(stored_init).report.step_size
    notes = load_init(tmp_path / "new").report.notes
    assert any("searched before input_damping changed" in note for note in notes)
    assert "searched before input_damping changed" in str(apply_init(lora_model(r=4), tmp_path / "new"))
    again = refit_init(tmp_path / "new", tmp_path / "newer", rank=2)
    assert again.manifest.refitted_from.changed == {"input_damping": 1e-2}
    with pytest.raises(ConfigError, match="layer_steps"):
        refit_init(stored_init, tmp_path / "other", config=changed(stored_init, layer_steps="equal"))
    given = refit_init(
        stored_init, tmp_path / "given", config=changed(stored_init, step_size=0.1, save_statistics=True)
    )
    with pytest.raises(ConfigError, match=r"so the stored step means nothing. Give a step_size"):
        refit_init(given.folder, tmp_path / "other", config=changed(given.folder, layer_steps="equal"))
    again = refit_init(given.folder, tmp_path / "other", config={"layer_steps": "equal", "step_size": 0.1})
    assert again.report.step_size == 0.1


def test_a_smaller_largest_rank_drops_the_steps_of_larger_ones(stored_init, tmp_path):
    refitted = refit_init(stored_init, tmp_path / "new", config=changed(stored_init, max_rank=8))
    assert {basis.basis_A.shape[0] for basis in refitted.bases.values()} == {8}
    assert set(refitted.report.step_size_by_rank) == {1, 4, 8}


# The folder


def test_the_manifest_says_what_it_was_refitted_from(stored_init, tmp_path):
    old = load_init(stored_init).manifest
    new = refit_init(stored_init, tmp_path / "new", config=changed(stored_init, variance_weight=0.2)).manifest
    assert new.refitted_from == RefittedFrom(manifest=old.digest, changed={"variance_weight": 0.2})
    assert old.refitted_from is None
    assert new.base_model == old.base_model
    assert new.identity == {}
    text = (tmp_path / "new" / MANIFEST_FILE).read_text()
    assert str(tmp_path) not in text


def test_statistics_go_along_on_request_to_the_bit(stored_init, tmp_path):
    refit_init(stored_init, tmp_path / "bare", rank=2)
    assert not list((tmp_path / "bare").glob("lora_da_statistics*"))
    assert load_init(tmp_path / "bare").manifest.config.save_statistics is False
    config = changed(stored_init, save_statistics=True)
    refit_init(stored_init, tmp_path / "new", rank=2, config=config)
    (old,), (new,) = (list(folder.glob("lora_da_statistics*")) for folder in (stored_init, tmp_path / "new"))
    assert old.read_bytes() == new.read_bytes()


def test_the_report_has_no_loss_that_was_not_measured(stored_init, tmp_path):
    old = load_init(stored_init).report
    refit_init(stored_init, tmp_path / "new", rank=2)
    new = load_init(tmp_path / "new").report
    assert old.search_loss_after is not None
    assert new.search_loss_after is None
    assert (new.num_samples, new.data_fingerprint) == (old.num_samples, old.data_fingerprint)
    assert {layer.rank for layer in new.layers} == {2}
    assert all(0 < a.update_norm for a in new.layers)
    assert "no loss was measured with this adapter" in str(new)


# What depends on more than the layer


def test_a_dora_adapter_is_refused_since_its_magnitudes_follow_from_the_base(lora_model, tmp_path):
    folder = store_init(tmp_path / "dora", lora_model(use_dora=True))
    with pytest.raises(ConfigError, match="apply_init"):
        refit_init(folder, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()
    model = lora_model(use_dora=True, r=2)
    apply_init(model, folder, step_size=0.1)
    assert_updates_equal(written_updates(model), dense_updates(folder, dict.fromkeys(load_init(folder).bases, 2), 0.1))


MIXTRAL = FAMILIES["Mixtral (experts)"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """An initialisation of experts, one of which no token is routed to."""
    model = MIXTRAL.adapt()
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(send_nothing_to_the_last_expert)
    return store_init(tmp_path_factory.mktemp("experts") / "init", model, max_rank=6)


def test_experts_are_solved_again_one_by_one(experts, tmp_path):
    config = changed(experts, input_damping=1e-2)
    refitted = refit_init(experts, tmp_path / "new", config=config)
    ranks = {name: layer.rank for name, layer in refitted.manifest.layers.items()}
    assert sum("[" in name for name in ranks) == 12
    loaded = PeftModel.from_pretrained(MIXTRAL.make_model(), tmp_path / "new")
    adapter, old = written_adapter(tmp_path / "new"), written_adapter(experts)
    assert_same_tensors(adapter_weights(loaded), adapter)
    expected = dense_updates(experts, ranks, refitted.report.step_size, config)
    for name, layer in refitted.manifest.layers.items():
        lora_A, lora_B = written_factors(adapter, name, layer.rank)
        found = layer.peft_scaling * lora_B.double() @ lora_A.double()
        assert relative_error(found, torch.from_numpy(expected[name])) < 1e-6
    for name in refitted.report.kept:
        for found, before in zip(*(written_factors(one, name, 4) for one in (adapter, old)), strict=True):
            assert torch.equal(found, before)


def test_experts_keep_their_rank_but_for_apply_init(experts, tmp_path):
    with pytest.raises(ConfigError, match=r"experts keep the rank .* apply_init"):
        refit_init(experts, tmp_path / "new", rank=3)
    model = MIXTRAL.adapt(r=3)
    report = apply_init(model, experts, step_size=0.1)
    weights = adapter_weights(model)
    expected = dense_updates(experts, {layer.name: 3 for layer in report.layers}, 0.1)
    for layer in report.layers:
        lora_A, lora_B = written_factors(weights, layer.name, 3)
        found = layer.peft_scaling * lora_B.double() @ lora_A.double()
        assert relative_error(found, torch.from_numpy(expected[layer.name])) < 1e-6


def test_a_config_is_taken_whole_and_a_mapping_for_what_it_names(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(), save_statistics=True, input_damping=0.5, variance_weight=0.3)
    named = refit_init(folder, tmp_path / "named", config={"variance_weight": 0.1}).manifest.config
    whole = refit_init(folder, tmp_path / "whole", config=LoRADAConfig(variance_weight=0.1)).manifest.config
    assert (named.variance_weight, whole.variance_weight) == (0.1, 0.1)
    assert (named.input_damping, whole.input_damping) == (0.5, LoRADAConfig().input_damping)
    with pytest.raises(ConfigError, match="num_samples=100"):
        refit_init(folder, tmp_path / "new", config={"num_samples": 100})


@pytest.mark.parametrize("settings", [{"rank": 2}, {"step_size": 0.5}])
def test_a_refit_in_place_keeps_the_statistics(stored_init, tmp_path, settings):
    folder = shutil.copytree(stored_init, tmp_path / "init")
    (tmp_path / "x").mkdir()
    expected = {path.name: path.read_bytes() for path in folder.glob("lora_da_statistics*")}
    refit_init(folder, tmp_path / "x" / ".." / "init", **settings)
    assert {path.name: path.read_bytes() for path in folder.glob("lora_da_statistics*")} == expected != {}
    assert load_init(folder).manifest.config.save_statistics
    assert {path.name for path in tmp_path.iterdir()} == {"init", "x"}
    refit_init(folder, folder, config=LoRADAConfig())
    assert {path.name: path.read_bytes() for path in folder.glob("lora_da_statistics*")} == expected
    refit_init(folder, folder, config={"save_statistics": False})
    assert not list(folder.glob("lora_da_statistics*"))
