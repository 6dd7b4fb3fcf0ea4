import dataclasses
import importlib.util
import logging
import shutil

import pytest
import torch
from conftest import make_tiny_llama
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_updates_equal,
    collate,
    collate_classes,
    dense_updates,
    factors,
    make_config,
    make_learnable_samples,
    make_lora_config,
    store_init,
    written_updates,
)
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

import lora_da_hf.pipeline.beside
import lora_da_hf.pipeline.step
from lora_da_hf import LoRADAConfig, apply_init, initialize_lora_da
from lora_da_hf.adapters.afterwards import was_initialized
from lora_da_hf.adapters.write import write_factors
from lora_da_hf.artifacts.manifest import BASIS_FILE
from lora_da_hf.artifacts.store import check_base_model, load_init
from lora_da_hf.errors import (
    AdapterAlreadyTrainedError,
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    TargetError,
)
from lora_da_hf.hub.facts import card_facts
from lora_da_hf.pipeline.base_model import base_model_facts, remember_commit
from lora_da_hf.pipeline.stored import changed_settings, config_for_refit, config_for_use

MLP_DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def samples():
    return make_learnable_samples(24)


@pytest.fixture
def folder(stored_init, tmp_path):
    return shutil.copytree(stored_init, tmp_path / "init")


def with_manifest(folder, **changes):
    """Return what is stored, with changes to its manifest."""
    stored = load_init(folder)
    report = dataclasses.replace(stored.report, **changes)
    return dataclasses.replace(stored, manifest=stored.manifest.model_copy(update={"report": report}))


# The base


def test_a_random_head_is_no_part_of_the_base(tmp_path, tiny_llama, lora_model):
    tiny_llama(name_or_path="base").model.save_pretrained(tmp_path / "base")

    def load(seed):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)

    first, second = load(0), load(1)
    assert not torch.equal(first.score.weight, second.score.weight)
    store_init(
        tmp_path / "init",
        lora_model(model=first, r=4, task_type="SEQ_CLS", target_modules=["q_proj"]),
        [{**sample, "labels": number % 2} for number, sample in enumerate(make_learnable_samples(24))],
        collate=collate_classes,
        step_size=0.1,
        max_rank=None,
    )
    facts = base_model_facts(second)
    check_base_model(load_init(tmp_path / "init").manifest, facts)
    adapted = lora_model(model=second, r=4, task_type="SEQ_CLS", target_modules=["q_proj"])
    assert base_model_facts(adapted) == facts
    report = apply_init(adapted, tmp_path / "init")
    assert len(report.layers) == 2
    assert "score got the stored weights, which the statistics were taken with" in report.notes
    head = adapted.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, first.score.modules_to_save["default"].weight)
    assert not any("were left out" in note for note in report.notes)
    bare = lora_model(model=load(1), r=4, target_modules=["q_proj"])
    assert any(
        note.startswith("score: trained beside the stored") for note in apply_init(bare, tmp_path / "init").notes
    )
    with torch.no_grad():
        second.model.norm.weight += 1
    assert base_model_facts(adapted).weights_sha256 != facts.weights_sha256


def test_a_head_is_put_back_if_the_start_fails(tmp_path, lora_model, monkeypatch):
    def model(seed, num_labels=2):
        torch.manual_seed(seed)
        config = make_tiny_llama().config
        config.num_labels, config.pad_token_id = num_labels, 0
        return lora_model(
            model=LlamaForSequenceClassification(config), r=4, task_type="SEQ_CLS", target_modules=["q_proj"]
        )

    def head_of(adapted):
        return adapted.base_model.model.score.modules_to_save["default"].weight.detach().clone()

    first, second, other = model(0), model(1), model(1, num_labels=3)
    for adapted in (second, other):  # the same body
        body = {name: value for name, value in first.state_dict().items() if "score" not in name}
        adapted.load_state_dict(body, strict=False)
    samples = [{**sample, "labels": number % 2} for number, sample in enumerate(make_learnable_samples(24))]
    store_init(tmp_path / "init", first, samples, collate=collate_classes, step_size=0.1, max_rank=None)
    before = head_of(second)
    with monkeypatch.context() as patch:
        patch.setattr("lora_da_hf.pipeline.apply.write_solutions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply_init(second, tmp_path / "init")
    assert torch.equal(head_of(second), before)
    before = head_of(other)
    report = apply_init(other, tmp_path / "init")
    assert torch.equal(head_of(other), before)
    assert "the stored weight of score has another shape and was left out" in report.notes


def cached(cache, commit, branch=None):
    repo = cache / "models--org--base"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    if branch is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)


def test_the_commit_of_a_base_is_found_in_the_cache(tmp_path, tiny_llama, monkeypatch):
    first, second = "a" * 40, "b" * 40
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(name_or_path="org/base")
    for commit, branch in ((first, "main"), (second, "v2")):
        cached(tmp_path / "cache", commit, branch=branch)
    assert base_model_facts(model).revision is None  # it may be either
    remember_commit(model, revision="v2", cache_dir=str(tmp_path / "cache"))
    assert base_model_facts(model).revision == second
    assert "_commit_hash" not in model.config.to_dict()


def test_a_base_in_a_folder_that_could_be_a_repository(tmp_path, tiny_llama, samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("checkpoints/base")
    base = AutoModelForCausalLM.from_pretrained("checkpoints/base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    initialize_lora_da(get_peft_model(base, config), samples, config=make_config(), output_dir="init", progress=False)
    stored = load_init("init")
    assert stored.manifest.base_model.name_or_path == "./checkpoints/base"
    assert PeftConfig.from_pretrained("init").base_model_name_or_path == "checkpoints/base"
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert card_facts(load_init(tmp_path / "init")).base_id is None
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    again = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    assert apply_init(again, tmp_path / "init").layers


def test_output_embeddings_are_a_part_of_the_base_even_if_they_are_trained_in_full(tiny_llama, lora_model):
    facts = base_model_facts(tiny_llama())
    adapted = lora_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert base_model_facts(adapted) == facts
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight += 1
    assert base_model_facts(other).weights_sha256 != facts.weights_sha256


def test_weights_that_the_base_has_of_its_own_are_not_taken_over(tmp_path, lora_model, samples, monkeypatch):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    store_init(tmp_path / "init", lora_model(**settings), samples)
    read = lora_da_hf.pipeline.beside.read_tensors
    monkeypatch.setattr(
        lora_da_hf.pipeline.beside, "read_tensors", lambda *given: {name: t * 0 for name, t in read(*given).items()}
    )
    model = lora_model(**settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    report = apply_init(model, tmp_path / "init")
    assert len(before) == 2
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])
    assert not any("got the stored weights" in note for note in report.notes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [3, 5], "lm_head": [7]}])
def test_a_base_is_the_same_with_tokens_of_it_to_train(tiny_llama, lora_model, tied, tokens):
    facts = base_model_facts(tiny_llama(tie_word_embeddings=tied))
    model = tiny_llama(tie_word_embeddings=tied)
    adapted = lora_model(model=model, target_modules=["q_proj"], trainable_token_indices=tokens)
    deltas = [p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    with torch.no_grad():
        for delta in deltas:
            delta += 1
    assert deltas
    assert base_model_facts(adapted) == facts
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.base_layer.weight += 1
    assert base_model_facts(adapted).weights_sha256 != facts.weights_sha256


def test_an_initialisation_with_tokens_to_train_is_used_on_the_plain_base(tmp_path, lora_model):
    adapted = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    folder = store_init(tmp_path / "init", lora_model(r=4, **adapted))
    assert len(apply_init(lora_model(r=4, target_modules=["q_proj"]), folder).layers) == 2
    assert len(apply_init(lora_model(r=4, **adapted), folder).layers) == 2


# How a pass would be made


@pytest.mark.parametrize("setting", [{"memory_budget": "1GiB"}, {"schedule": "layers"}, {"statistics_save_steps": 5}])
def test_how_a_pass_is_made_may_be_said_where_there_is_none(stored_init, setting):
    manifest = load_init(stored_init).manifest
    stored = manifest.config
    used = config_for_use(manifest, LoRADAConfig(**setting))
    assert changed_settings(used, dataclasses.replace(stored, rank_budget=None)) == []
    refitted = config_for_refit(manifest, LoRADAConfig(input_damping=0.5, **setting))
    assert [getattr(refitted, name) for name in setting] == [getattr(stored, name) for name in setting]
    assert refitted.input_damping == 0.5


# The weights


@pytest.mark.parametrize(
    ("rank", "lora"),
    [(1, {"lora_alpha": 7}), (4, {"lora_alpha": 5, "use_rslora": True}), (16, {"lora_alpha": 64})],
)
def test_any_rank_and_scaling_gives_what_a_dense_solve_gives(stored_init, lora_model, rank, lora):
    model = lora_model(r=rank, **lora)
    report = apply_init(model, stored_init, step_size=0.07)
    ranks = {name: rank for name in load_init(stored_init).bases}
    assert_updates_equal(written_updates(model), dense_updates(stored_init, ranks, 0.07))
    assert len(report.layers) == LINEAR_LAYERS
    assert {layer.rank for layer in report.layers} == {rank}
    assert report.step_size == 0.07


def test_ranks_and_scalings_by_layer_are_peft_s(stored_init, lora_model):
    model = lora_model(r=4, rank_pattern={"v_proj": 11, "down_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True)
    report = apply_init(model, stored_init, step_size=0.07)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert {ranks[name] for name in ranks if name.endswith("v_proj")} == {11}
    assert_updates_equal(written_updates(model), dense_updates(stored_init, ranks, 0.07))
    update_norms = {name: update.norm().item() for name, update in written_updates(model).items()}
    assert {layer.name: layer.update_norm for layer in report.layers} == pytest.approx(update_norms)


def test_at_the_stored_rank_it_is_the_stored_adapter(stored_init, lora_model):
    model = lora_model(r=8)
    report = apply_init(model, stored_init)
    manifest = load_init(stored_init).manifest
    stored = load_file(stored_init / "adapter_model.safetensors")
    assert report.step_size == manifest.report.step_size > 0
    for name, weight in adapter_weights(model).items():
        torch.testing.assert_close(weight, stored[name], rtol=1e-6, atol=1e-9)


def test_the_layers_compute_with_it_and_the_base_stays(stored_init, lora_model, tiny_llama):
    model = lora_model(r=4)
    objects = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in objects.items()}
    apply_init(model, stored_init)
    after = dict(model.named_parameters())
    assert all(after[name] is objects[name] for name in objects)
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    base = dict(tiny_llama().named_parameters())
    layer = model.get_base_model().get_submodule(MLP_DOWN)
    weight = base[f"{MLP_DOWN}.weight"].detach()
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(layer(x), x @ (weight + written_updates(model)[MLP_DOWN].float()).T)
    assert torch.equal(layer.base_layer.weight, weight)


def test_layers_of_gpt2_are_started_too(tmp_path, lora_model):
    def make_gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=2))

    adapted = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    folder = store_init(tmp_path / "init", lora_model(model=make_gpt2(), **adapted), max_rank=12)
    model = lora_model(model=make_gpt2(), r=5, **adapted)
    report = apply_init(model, folder, step_size=0.1)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert set(ranks) == {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"}
    assert_updates_equal(written_updates(model), dense_updates(folder, ranks, 0.1))


def test_the_split_is_the_stored_one_unless_another_is_asked_for(stored_init, lora_model):
    models = {split: lora_model(r=4) for split in (None, "orthonormal", "balanced")}
    for split, model in models.items():
        config = None if split is None else LoRADAConfig(factor_split=split)
        apply_init(model, stored_init, config=config, step_size=0.1)
    norms = {
        split: {round(row.norm().item(), 4) for a in factors(adapter_weights(model), "A").values() for row in a}
        for split, model in models.items()
    }
    assert norms[None] == {round(3**-0.5, 4)}
    assert norms["orthonormal"] == {round((0.1 / 4) ** 0.5, 4)}
    assert len(norms["balanced"]) > 10
    expected = written_updates(models[None])
    for model in models.values():
        assert_updates_equal(written_updates(model), {name: u.numpy() for name, u in expected.items()})


def test_another_adapter_can_be_named(stored_init, lora_model):
    model = lora_model(r=4)
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    apply_init(model, stored_init, adapter_name="second")
    assert all(p.any() == ("second" in name) for name, p in model.named_parameters() if "lora_B" in name)


# The step


def test_a_searched_rank_takes_its_step_and_one_between_two_is_interpolated(stored_init, lora_model):
    steps = {int(rank): step for rank, step in load_init(stored_init).report.step_size_by_rank.items()}
    assert set(steps) == {1, 4, 8, 16}
    exact = apply_init(lora_model(r=4), stored_init)
    assert exact.step_size == steps[4]
    assert f"step {steps[4]:.4g}, searched for rank 4" in exact.notes
    between = apply_init(lora_model(r=2), stored_init)
    assert between.step_size == pytest.approx((steps[1] * steps[4]) ** 0.5)
    assert "interpolated for rank 2 between those of ranks 1 and 4" in str(between)


def test_ranks_by_layer_take_one_step_at_their_geometric_mean(stored_init, lora_model):
    init = with_manifest(stored_init, step_size_by_rank={1: 0.8, 4: 0.2, 16: 0.1})
    pattern = {"q_proj": 16, "k_proj": 1, "v_proj": 16, "o_proj": 1}
    model = lora_model(r=4, rank_pattern=pattern)
    assert apply_init(model, init).step_size == pytest.approx(0.2)


def test_beside_a_rank_where_no_step_helped_the_step_is_zero(stored_init, lora_model):
    model = lora_model(r=2)
    report = apply_init(model, with_manifest(stored_init, step_size_by_rank={1: 0.8, 4: 0.0}))
    assert report.step_size == 0.0
    assert not any(b.any() for b in factors(adapter_weights(model), "B").values())
    assert all(a.any() for a in factors(adapter_weights(model), "A").values())
    assert "step 0: for rank 1 or rank 4 no step helped" in report.notes


def test_a_rank_beyond_the_searched_ones_takes_the_nearest_step(stored_init, lora_model):
    report = apply_init(lora_model(r=12), with_manifest(stored_init, step_size_by_rank={1: 0.8, 4: 0.2}))
    assert report.step_size == 0.2
    assert "step 0.2, searched for rank 4, not 12" in report.notes


def test_a_step_that_follows_from_stable_gamma_does_so_for_each_layer(tmp_path, lora_model):
    settings = LoRADAConfig.paper(num_samples=12, stable_gamma=64.0, max_rank=8, save_statistics=True).to_dict()
    folder = store_init(tmp_path / "init", lora_model(), **settings)
    model = lora_model(r=3, lora_alpha=6, alpha_pattern={"q_proj": 12})
    report = apply_init(model, folder)
    assert report.step_size is None
    steps = {layer.name: (4 if "q_proj" in layer.name else 2) / 64 for layer in report.layers}
    ranks = dict.fromkeys(steps, 3)
    assert_updates_equal(written_updates(model), dense_updates(folder, ranks, steps))
    rows = torch.cat([row.norm(dim=1) for name, row in factors(adapter_weights(model), "A").items() if "q_" in name])
    assert rows == pytest.approx(torch.full_like(rows, 64**-0.5).numpy(), rel=1e-4)


def test_with_samples_the_step_is_searched_as_an_initialisation_would(stored_init, lora_model, samples):
    computed = initialize_lora_da(lora_model(r=4), samples, config=make_config(), data_collator=collate, progress=False)
    report = apply_init(lora_model(r=4), stored_init, samples=samples, data_collator=collate, progress=False)
    assert report.search_loss_after < report.search_loss_before
    assert report.search_loss_before == pytest.approx(computed.search_loss_before)
    assert report.search_loss_after == pytest.approx(computed.search_loss_after, rel=1e-4)
    assert report.step_size == pytest.approx(computed.step_size, rel=1e-2)
    assert report.unseen_loss_before == pytest.approx(computed.unseen_loss_before)
    assert (report.num_samples, report.population_size) == (12, 24)


def test_where_the_statistics_may_have_seen_all_samples_it_is_said_that_nothing_was_measured(
    stored_init, lora_model, samples
):
    few = apply_init(lora_model(r=4), stored_init, samples=samples[:8], step_size=0.1, data_collator=collate)
    assert few.unseen_loss_after is None
    assert "no loss was measured: the statistics may have seen all of the 8 samples" in few.notes
    enough = apply_init(lora_model(r=4), stored_init, samples=samples, step_size=0.1, data_collator=collate)
    assert enough.unseen_loss_after is not None
    assert not any("no loss was measured" in note for note in enough.notes)


def test_settings_can_be_given_by_name_their_defaults_too(stored_init, lora_model):
    stored = load_init(stored_init).manifest.config
    manifest = load_init(stored_init).manifest
    assert stored.search_samples != LoRADAConfig().search_samples
    found = config_for_use(manifest, {"search_samples": LoRADAConfig().search_samples})
    assert changed_settings(found, config_for_use(manifest, None)) == ["search_samples"]
    assert config_for_use(manifest, LoRADAConfig()) == config_for_use(manifest, None)
    report = apply_init(lora_model(r=4), stored_init, config={"step_size": 0.25})
    assert report.step_size == 0.25
    with pytest.raises(ConfigError, match=r"input_damping=0\.5: the stored initialisation was computed with"):
        apply_init(lora_model(r=4), stored_init, config={"input_damping": 0.5})
    with pytest.raises(ConfigError, match="input_dumping"):
        apply_init(lora_model(r=4), stored_init, config={"input_dumping": 0.5})


def test_a_stream_can_be_searched_on(stored_init, lora_model, samples):
    report = apply_init(lora_model(r=4), stored_init, samples=iter(samples), data_collator=collate, progress=False)
    assert report.search_loss_after < report.search_loss_before


# What it says


def test_the_report_says_what_was_done_and_from_what(stored_init, lora_model):
    stored = load_init(stored_init)
    report = apply_init(lora_model(r=4, target_modules=["q_proj", "v_proj"]), stored_init)
    assert report.init_from == stored.manifest.digest
    assert report.artifact == str(stored_init)
    assert [layer.name for layer in report.layers] == [
        f"model.layers.{n}.self_attn.{which}_proj" for n in range(2) for which in "qv"
    ]
    assert report.data_fingerprint == stored.manifest.report.data_fingerprint
    assert report.search_loss_before is None
    assert any(note.startswith("10 stored layers have no adapter here") for note in report.notes)
    assert f"init from   {report.init_from} ({stored_init})" in str(report)


def test_what_was_pulled_is_cited_by_repository_and_commit(stored_init, lora_model):
    pulled = dataclasses.replace(load_init(stored_init), source="someone/init@c0ffee")
    assert apply_init(lora_model(r=4), pulled).init_from == "someone/init@c0ffee"


def test_what_was_loaded_before_is_checked_against_the_model_all_the_same(stored_init, lora_model, tiny_llama):
    stored = load_init(stored_init)
    assert apply_init(lora_model(r=4), stored).init_from == stored.manifest.digest
    with pytest.raises(BaseModelMismatchError, match="its weights have another fingerprint"):
        apply_init(lora_model(model=tiny_llama(seed=1)), stored)


def test_the_model_counts_as_initialised_and_a_second_time_is_refused(stored_init, lora_model):
    model = lora_model(r=4)
    assert not was_initialized(model, "default")
    apply_init(model, stored_init)
    assert was_initialized(model, "default")
    with pytest.raises(AdapterAlreadyTrainedError, match="lora_B is not zero"):
        apply_init(model, stored_init)


def test_a_can_be_frozen(stored_init, lora_model):
    model = lora_model(r=4)
    apply_init(model, stored_init, config=LoRADAConfig(freeze_a=True))
    assert all(p.requires_grad == ("lora_B" in name) for name, p in model.named_parameters())


# Layers that do not match


def test_a_layer_without_a_stored_basis_is_an_error_that_names_it(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(target_modules=["q_proj", "v_proj"]))
    model = lora_model(target_modules=["q_proj", "k_proj"])
    before = adapter_weights(model)
    message = r"nothing for 2 of 4 layers \(model.layers.0.self_attn.k_proj first\). Leave them out of target_modules"
    with pytest.raises(TargetError, match=message):
        apply_init(model, folder)
    assert_same_tensors(adapter_weights(model), before)


def test_a_layer_that_was_left_to_peft_is_left_to_peft_again(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(rank_pattern={"o_proj": 50}))
    model = lora_model(r=4)
    before = adapter_weights(model)
    report = apply_init(model, folder)
    assert set(report.kept) == {f"model.layers.{n}.self_attn.o_proj" for n in range(2)}
    assert "stored initialisation has none for it: rank 50 is above its input size 48" in str(report)
    after = adapter_weights(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "o_proj" in n}


def test_a_rank_above_the_stored_one_is_an_error(stored_init, lora_model):
    model = lora_model(r=4, rank_pattern={"gate_proj": 17})
    before = adapter_weights(model)
    message = r"model.layers.0.mlp.gate_proj has rank 17, and rank 16 is stored. Lower the adapter's rank; or, if"
    with pytest.raises(TargetError, match=message):
        apply_init(model, stored_init)
    assert_same_tensors(adapter_weights(model), before)
    assert not was_initialized(model, "default")


def test_a_failure_in_the_middle_of_the_write_puts_the_adapter_back(stored_init, lora_model, monkeypatch):
    model = lora_model(r=4)
    before = adapter_weights(model)

    def fails_at_the_last(target, lora_A, lora_B):
        if "layers.1.mlp.down" in target.name:
            raise RuntimeError("no more")
        write_factors(target, lora_A, lora_B)

    monkeypatch.setattr(lora_da_hf.pipeline.step, "write_factors", fails_at_the_last)
    with pytest.raises(RuntimeError, match="no more"):
        apply_init(model, stored_init)
    assert_same_tensors(adapter_weights(model), before)
    assert not was_initialized(model, "default")


# Settings


@pytest.mark.parametrize(
    ("setting", "stored"),
    [({"input_damping": 1e-3}, "input_damping='0.1*mean'"), ({"num_samples": 64}, "num_samples=12")],
)
def test_a_setting_of_the_stored_solution_cannot_be_changed(stored_init, lora_model, setting, stored):
    (name, value), *_ = setting.items()
    message = (
        rf"{name}={value}: the stored initialisation was computed with {stored}. Leave that out, or use refit_init"
    )
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        apply_init(lora_model(r=4), stored_init, config=LoRADAConfig(**setting))


def test_settings_that_are_the_stored_ones_may_be_repeated(stored_init, lora_model):
    config = make_config(max_rank=16, save_statistics=True, step_size=0.03)
    assert apply_init(lora_model(r=4), stored_init, config=config).step_size == 0.03


# The base


def test_a_bfloat16_copy_of_the_base_gets_the_same_adapter(stored_init, lora_model, tiny_llama):
    model = lora_model(model=tiny_llama().to(torch.bfloat16), r=4)
    assert apply_init(model, stored_init).notes == [f"step {_step(stored_init, 4):.4g}, searched for rank 4"]
    plain = lora_model(r=4)
    apply_init(plain, stored_init)
    assert_same_tensors(adapter_weights(model), adapter_weights(plain))


def _step(folder, rank):
    return load_init(folder).report.step_size_by_rank[rank]


def test_an_adapter_in_bfloat16_gets_it_rounded(stored_init, lora_model, tiny_llama):
    model = lora_model(model=tiny_llama().to(torch.bfloat16), r=4, autocast_adapter_dtype=False)
    apply_init(model, stored_init, step_size=0.1)
    plain = lora_model(r=4)
    apply_init(plain, stored_init, step_size=0.1)
    expected = {name: weight.to(torch.bfloat16) for name, weight in adapter_weights(plain).items()}
    assert_same_tensors(adapter_weights(model), expected)


@pytest.mark.parametrize(
    ("other", "difference"),
    [({"seed": 1}, "its weights have another fingerprint"), ({"intermediate_size": 96}, "intermediate_size is 96 and")],
)
def test_another_base_is_refused_with_the_difference(stored_init, lora_model, tiny_llama, other, difference):
    model = lora_model(model=tiny_llama(**other))
    before = adapter_weights(model)
    with pytest.raises(BaseModelMismatchError, match=difference):
        apply_init(model, stored_init)
    assert_same_tensors(adapter_weights(model), before)


def load_quantised(folder, bits):
    settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_matched_by_its_name_with_a_warning(tmp_path, tiny_llama, lora_model, bits, caplog):
    size = {"hidden_size": 64, "intermediate_size": 128}
    base, other = tmp_path / "base", tmp_path / "other"
    tiny_llama(**size).save_pretrained(base)
    tiny_llama(seed=1, **size).save_pretrained(other)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    folder = store_init(tmp_path / "init", lora_model(model=plain))
    model = lora_model(model=load_quantised(base, bits))
    with caplog.at_level(logging.WARNING):
        report = apply_init(model, folder, step_size=0.1)
    note = f"quantised or sharded ones have no fingerprint: that it is '{base}' is taken from its name and revision"
    assert note in caplog.text
    assert any(note in entry for entry in report.notes)
    reference = lora_model(model=AutoModelForCausalLM.from_pretrained(base))
    apply_init(reference, folder, step_size=0.1)
    assert_same_tensors(adapter_weights(model), adapter_weights(reference))
    with pytest.raises(BaseModelMismatchError, match=f"name_or_path is '{other}' and was '{base}'"):
        apply_init(lora_model(model=load_quantised(other, bits)), folder)
    nameless = load_quantised(base, bits)
    nameless.config._name_or_path = ""
    with pytest.raises(BaseModelMismatchError, match="as quantised ones, are matched by name, and the model has none"):
        apply_init(lora_model(model=nameless), folder)


def test_a_base_without_a_fingerprint_is_matched_by_revision_too(stored_init, caplog):
    stored = load_init(stored_init).manifest
    base = stored.base_model.model_copy(update={"name_or_path": "someone/base", "revision": "c0ffee"})
    manifest = stored.model_copy(update={"base_model": base})
    found = base.model_copy(update={"weights_sha256": None})
    for revision in ("c0ffee", None):  # a local copy has no revision
        assert len(check_base_model(manifest, found.model_copy(update={"revision": revision}))) == 1
    assert len(caplog.records) == 2
    with pytest.raises(BaseModelMismatchError, match="revision is 'beef' and was 'c0ffee'"):
        check_base_model(manifest, found.model_copy(update={"revision": "beef"}))
    assert check_base_model(manifest, base.model_copy(update={"name_or_path": "/a/copy"})) == ()


# Damage


def test_a_damaged_initialisation_is_refused_before_it_is_used(folder, lora_model):
    model = lora_model(r=4)
    before = adapter_weights(model)
    content = bytearray((folder / BASIS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / BASIS_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="another SHA-256"):
        apply_init(model, folder)
    assert_same_tensors(adapter_weights(model), before)


def test_a_stored_layer_of_other_widths_is_refused(stored_init, lora_model):
    stored = load_init(stored_init)
    basis = stored.bases[MLP_DOWN]
    narrow = dataclasses.replace(basis, basis_A=basis.basis_A[:, :40])
    message = f"{MLP_DOWN} maps 80 to 48 features, and the stored layer of that name 40 to 48"
    with pytest.raises(TargetError, match=message):
        apply_init(lora_model(r=4), dataclasses.replace(stored, bases={**stored.bases, MLP_DOWN: narrow}))
