"""A stored initialisation starts other adapters of its base: any rank, any scaling, no data."""

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
    change_tensors,
    collate,
    collate_classes,
    dense_updates,
    factors,
    forge_manifest,
    initialize,
    make_config,
    make_learnable_samples,
    make_lora_config,
    model_loss,
    store_init,
    written_adapter,
    written_updates,
)
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from lora_da_hf import LoRADAConfig, apply_init, load_init
from lora_da_hf.errors import (
    BaseModelMismatchError,
    ConfigError,
    TargetError,
)
from lora_da_hf.pipeline.base_model import base_model_facts

MLP_DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(stored_init, tmp_path):
    return shutil.copytree(stored_init, tmp_path / "init")


def refuses(kind, match, model, init, **settings):
    """Check the error, and that it leaves the adapter as it was."""
    before = adapter_weights(model)
    with pytest.raises(kind, match=match):
        apply_init(model, init, **settings)
    assert_same_tensors(adapter_weights(model), before)


# The weights


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 5, "use_rslora": True},
        {"r": 16, "lora_alpha": 64},
        {"r": 4, "rank_pattern": {"v_proj": 11, "down_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
)
def test_any_rank_and_scaling_gives_what_a_dense_solve_gives(stored_init, lora_model, lora):
    model = lora_model(**lora)
    report = apply_init(model, stored_init, step_size=0.07)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert len(ranks) == LINEAR_LAYERS
    assert_updates_equal(written_updates(model), dense_updates(stored_init, ranks, 0.07))
    norms = {name: update.norm().item() for name, update in written_updates(model).items()}
    assert {layer.name: layer.update_norm for layer in report.layers} == pytest.approx(norms)
    pattern = lora.get("rank_pattern", {})
    assert ranks == {name: pattern.get(name.rpartition(".")[2], lora["r"]) for name in ranks}


def test_at_the_stored_rank_it_is_the_stored_adapter(stored_init, lora_model):
    model = lora_model(r=8)
    report = apply_init(model, stored_init)
    assert report.step_size == load_init(stored_init).report.step_size > 0
    stored = written_adapter(stored_init)
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
    layer, weight = (m.get_submodule(MLP_DOWN) for m in (model.get_base_model(), tiny_llama()))
    weight = weight.weight.detach()
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(layer(x), x @ (weight + written_updates(model)[MLP_DOWN].float()).T)
    assert torch.equal(layer.base_layer.weight, weight)


def test_the_split_is_the_stored_one_unless_another_is_asked_for(stored_init, lora_model):
    norms, updates = {}, {}
    for split in (None, "orthonormal", "balanced"):
        model = lora_model(r=4)
        config = None if split is None else LoRADAConfig(factor_split=split)
        apply_init(model, stored_init, config=config, step_size=0.1)
        norms[split] = {
            round(n.item(), 4) for a in factors(adapter_weights(model), "A").values() for n in a.norm(dim=1)
        }
        updates[split] = written_updates(model)
        assert_updates_equal(written_updates(model), updates[None])
    assert norms[None] == {round(3**-0.5, 4)}
    assert norms["orthonormal"] == {round((0.1 / 4) ** 0.5, 4)}
    assert len(norms["balanced"]) > 10


def test_the_active_adapter_is_written(stored_init, lora_model):
    model = lora_model(r=4)
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    apply_init(model, stored_init)
    assert all(p.any() == ("second" in name) for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_bfloat16_copy_of_the_base_gets_the_same_adapter_in_its_own_dtype(
    stored_init, lora_model, tiny_llama, rounded
):
    plain, model = (
        lora_model(model=tiny_llama(dtype=dtype), r=4, autocast_adapter_dtype=not rounded)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one in (plain, model):
        apply_init(one, stored_init)
    dtype = torch.bfloat16 if rounded else torch.float32
    assert_same_tensors(adapter_weights(model), {n: w.to(dtype) for n, w in adapter_weights(plain).items()})


# The step


def test_a_searched_rank_takes_its_step_and_one_between_two_is_interpolated(stored_init, lora_model):
    steps = load_init(stored_init).report.step_size_by_rank
    assert set(steps) == {1, 4, 8, 16}
    assert apply_init(lora_model(r=4), stored_init).step_size == steps[4]
    between = apply_init(lora_model(r=2), stored_init)
    assert between.step_size == pytest.approx((steps[1] * steps[4]) ** 0.5)
    assert any("interpolated" in note for note in between.notes)


PATTERN = {"q_proj": 16, "k_proj": 1, "v_proj": 16, "o_proj": 1}


@pytest.mark.parametrize(
    ("steps", "lora", "expected"),
    [
        ({1: 0.8, 4: 0.2, 16: 0.1}, {"r": 4, "rank_pattern": PATTERN}, 0.2),  # at their geometric mean
        ({1: 0.8, 4: 0.2}, {"r": 12}, 0.2),  # beyond the searched ones: the nearest
        ({1: 0.8, 4: 0.0}, {"r": 2}, 0.0),  # beside a rank where no step helped
    ],
)
def test_the_step_of_other_ranks(folder, lora_model, steps, lora, expected):
    forge_manifest(folder, step_size_by_rank=steps)
    model = lora_model(**lora)
    assert apply_init(model, folder).step_size == pytest.approx(expected)
    weights = adapter_weights(model)
    assert all(b.any() == (expected > 0) for b in factors(weights, "B").values())
    assert all(a.any() for a in factors(weights, "A").values())


def test_a_step_that_follows_from_stable_gamma_does_so_for_each_layer(tmp_path, lora_model):
    settings = LoRADAConfig.paper(num_samples=12, stable_gamma=64.0, max_rank=8, save_statistics=True).to_dict()
    folder = store_init(tmp_path / "init", lora_model(), **settings)
    model = lora_model(r=3, lora_alpha=6, alpha_pattern={"q_proj": 12})
    report = apply_init(model, folder)
    assert report.step_size is None
    steps = {layer.name: (4 if "q_proj" in layer.name else 2) / 64 for layer in report.layers}
    assert_updates_equal(written_updates(model), dense_updates(folder, dict.fromkeys(steps, 3), steps))


def test_with_samples_the_step_is_searched_as_an_initialisation_would(stored_init, lora_model, samples):
    computed = initialize(lora_model(r=4), samples)
    given = {"step_size": "line_search", "data_collator": collate, "progress": False}
    report = apply_init(lora_model(r=4), stored_init, samples=samples, **given)
    assert report.search_loss_after < report.search_loss_before
    assert report.search_loss_before == pytest.approx(computed.search_loss_before)
    assert report.search_loss_after == pytest.approx(computed.search_loss_after, rel=1e-4)
    assert report.step_size == pytest.approx(computed.step_size, rel=1e-2)
    assert report.unseen_loss_before == pytest.approx(computed.unseen_loss_before)
    streamed = apply_init(lora_model(r=4), stored_init, samples=iter(samples), **given)
    assert streamed.search_loss_after < streamed.search_loss_before
    with pytest.raises(ConfigError, match="needs samples"):
        apply_init(lora_model(r=4), stored_init, step_size="line_search")


def test_the_stored_step_is_measured_where_there_are_samples(stored_init, lora_model, samples, caplog):
    stored, own = load_init(stored_init).report, {"data_collator": collate, "progress": False}
    report = apply_init(lora_model(r=4), stored_init, samples=samples, **own)
    assert (report.step_size, report.search) == (stored.step_size, [])
    assert report.unseen_loss_before == pytest.approx(stored.unseen_loss_before)
    assert report.unseen_loss_after < report.unseen_loss_before
    assert not caplog.text
    others = [{**sample, "input_ids": sample["input_ids"][::-1]} for sample in samples]
    bad = apply_init(lora_model(r=4), stored_init, samples=others, step_size=500.0, **own)
    assert bad.unseen_loss_after > bad.unseen_loss_before
    assert "did not fall" in caplog.text
    assert bad.step_size == 500.0
    assert [any("may have seen" in note for note in one.notes) for one in (report, bad)] == [False, True]
    without = apply_init(lora_model(r=4), stored_init, progress=False)
    assert any(f"{stored.unseen_loss_after:.4f}" in note for note in without.notes)


def test_where_the_statistics_may_have_seen_all_samples_nothing_is_measured(stored_init, lora_model, samples):
    found = [
        apply_init(lora_model(r=4), stored_init, samples=some, step_size=0.1, data_collator=collate, progress=False)
        for some in (samples[:8], samples)
    ]
    assert [report.unseen_loss_after is None for report in found] == [True, False]
    assert [any("no loss was measured" in note for note in report.notes) for report in found] == [True, False]


# What it says, and settings


def test_the_report_says_what_was_done_and_from_what(stored_init, lora_model):
    stored = load_init(stored_init)
    report = apply_init(lora_model(r=4, target_modules=["q_proj", "v_proj"]), stored)
    assert report.init_from == stored.source
    assert stored.source.startswith("sha256:")
    assert report.artifact == str(stored_init)
    assert [layer.name for layer in report.layers] == [
        f"model.layers.{n}.self_attn.{which}_proj" for n in range(2) for which in "qv"
    ]
    assert report.data_fingerprint == stored.report.data_fingerprint
    assert report.search_loss_before is None
    assert any(note.startswith("10 stored layers") for note in report.notes)
    assert report.init_from in str(report)
    narrower = apply_init(lora_model(r=2, target_modules=["q_proj", "v_proj"]), stored)
    for made in (report, narrower):
        assert any(note.endswith("searched with 10 more layers") for note in made.notes)


def test_a_setting_of_the_stored_solution_cannot_be_changed(stored_init, lora_model):
    for setting in ({"input_damping": 1e-3}, {"num_samples": 64}):
        (name,) = setting
        refuses(ConfigError, name, lora_model(r=4), stored_init, config=LoRADAConfig(**setting))
        refuses(ConfigError, name, lora_model(r=4), stored_init, config=setting)
    refuses(ConfigError, "input_dumping", lora_model(r=4), stored_init, config={"input_dumping": 0.5})


def test_the_step_the_stored_settings_and_how_a_pass_is_made_may_be_given(stored_init, lora_model):
    for config in (
        make_config(max_rank=16, save_statistics=True, step_size=0.03),
        {"step_size": 0.03, "memory_budget": "1GiB"},
    ):
        assert apply_init(lora_model(r=4), stored_init, config=config).step_size == 0.03


# Layers that do not match


def test_a_layer_without_a_stored_basis_is_an_error_that_names_it(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(target_modules=["q_proj", "v_proj"]))
    refuses(TargetError, r"model.layers.0.self_attn.k_proj", lora_model(target_modules=["q_proj", "k_proj"]), folder)


def test_a_layer_that_was_left_to_peft_is_left_to_peft_again(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(rank_pattern={"o_proj": 50}, alpha_pattern={"o_proj": 200}))
    model = lora_model(r=4)
    before = adapter_weights(model)
    report = apply_init(model, folder)
    assert set(report.kept) == {f"model.layers.{n}.self_attn.o_proj" for n in range(2)}
    assert all("rank 50" in reason for reason in report.kept.values())
    after = adapter_weights(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "o_proj" in n}


def test_a_rank_above_the_stored_one_is_an_error(stored_init, lora_model):
    model = lora_model(r=4, rank_pattern={"gate_proj": 17})
    refuses(TargetError, r"model.layers.0.mlp.gate_proj.*17.*16", model, stored_init)


def fails_late(model, batch, num_items):
    """Raise once the adapter was written."""
    if any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
        raise RuntimeError("late")
    return model_loss(model, batch, num_items)


def test_a_late_failure_puts_the_adapter_back(stored_init, lora_model, samples):
    model = lora_model(r=4)
    settings = {"samples": samples, "data_collator": collate, "progress": False}
    refuses(RuntimeError, "late", model, stored_init, compute_loss=fails_late, **settings)
    assert apply_init(model, stored_init, **settings).step_size > 0


# The base


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "adapted",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
    ],
    ids=["plain", "head", "tokens", "two kinds of tokens"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_base_is_recognised_whatever_is_trained_of_it(tmp_path, tiny_llama, lora_model, tied, adapted):
    def make_model(change=None, **lora):
        base = tiny_llama(tie_word_embeddings=tied)
        with torch.no_grad():
            if change is not None:
                base.get_parameter(change).add_(1)
        return lora_model(model=base, target_modules=["q_proj"], **lora)

    folder = store_init(tmp_path / "init", make_model(**adapted))
    assert len(apply_init(make_model(), folder).layers) == 2
    assert len(apply_init(make_model(**adapted), folder).layers) == 2
    for weight in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        with pytest.raises(BaseModelMismatchError):
            apply_init(make_model(weight, **adapted), folder)


@pytest.mark.parametrize("other", [{"seed": 1}, {"intermediate_size": 96}])
def test_another_base_is_refused(stored_init, lora_model, tiny_llama, other):
    for init in (stored_init, load_init(stored_init)):  # what was loaded before is checked all the same
        refuses(BaseModelMismatchError, "fingerprint", lora_model(model=tiny_llama(**other)), init)


def classifier(folder, seed, num_labels=2, **lora):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=0, num_labels=num_labels)
    config = make_lora_config(target_modules=["q_proj"], **{"task_type": "SEQ_CLS", **lora})
    return get_peft_model(model, config)


def head_of(adapted):
    return adapted.base_model.model.score.modules_to_save["default"].weight.detach().clone()


def test_a_random_head_is_no_part_of_the_base_and_gets_the_stored_weights(tmp_path):
    make_tiny_llama().model.save_pretrained(tmp_path / "base")
    samples = [{**sample, "labels": number % 2} for number, sample in enumerate(make_learnable_samples(24))]
    first = classifier(tmp_path / "base", 0)
    initialize(first, samples, tmp_path / "init", collator=collate_classes, step_size=0.1)
    second = classifier(tmp_path / "base", 1)
    before = head_of(second)
    assert not torch.equal(before, head_of(first))
    settings = {"samples": samples, "data_collator": collate_classes, "progress": False}
    refuses(RuntimeError, "late", second, tmp_path / "init", compute_loss=fails_late, step_size=0.1, **settings)
    assert torch.equal(head_of(second), before)
    report = apply_init(second, tmp_path / "init")
    assert torch.equal(head_of(second), head_of(first))
    assert any(note.startswith("score got the stored weights") for note in report.notes)
    other = classifier(tmp_path / "base", 1, num_labels=3)
    before = head_of(other)
    report = apply_init(other, tmp_path / "init")
    assert torch.equal(head_of(other), before)
    assert any("score.weight has another shape" in note for note in report.notes)
    bare = apply_init(classifier(tmp_path / "base", 1, task_type=None), tmp_path / "init")
    assert any(note.startswith("score: trained beside the stored") for note in bare.notes)


def test_weights_that_the_base_has_of_its_own_are_not_taken_over(tmp_path, lora_model):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = store_init(tmp_path / "init", lora_model(**settings))

    def halve(tensors):
        for name in tensors:
            if "lora_" not in name:
                tensors[name] *= 0.5

    change_tensors(folder / "adapter_model.safetensors", halve)
    forge_manifest(folder)
    model = lora_model(**settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    apply_init(model, folder)
    assert len(before) == 2
    assert_same_tensors({name: p for name, p in model.named_parameters() if name in before}, before)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_of_a_base_in_a_folder_the_folder_s_own_name_is_stored(
    tmp_path, tiny_llama, lora_model, samples, monkeypatch, is_absolute
):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("checkpoints/base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/base" if is_absolute else "checkpoints/base")
    initialize(lora_model(model=base, target_modules=["q_proj"]), samples, "init")
    assert load_init("init").manifest.base_model.name_or_path == "./base"
    assert PeftConfig.from_pretrained("init").base_model_name_or_path == "base"
    for file in ("lora_da_manifest.json", "adapter_config.json"):
        assert str(tmp_path) not in (tmp_path / "init" / file).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path / "checkpoints")
    again = lora_model(model=AutoModelForCausalLM.from_pretrained("base"), target_modules=["q_proj"])
    assert apply_init(again, tmp_path / "init").layers


def test_a_base_in_the_cache_has_the_name_of_its_repository(tmp_path, tiny_llama):
    folder = tmp_path / "models--org--name" / "snapshots" / ("c0ffee00" * 5)
    tiny_llama().save_pretrained(folder)
    facts = base_model_facts(AutoModelForCausalLM.from_pretrained(folder))
    assert (facts.name_or_path, facts.revision) == ("org/name", "c0ffee00" * 5)


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
    folder = store_init(tmp_path / "init", lora_model(model=AutoModelForCausalLM.from_pretrained(base)))
    model, plain = (
        lora_model(model=m) for m in (load_quantised(base, bits), AutoModelForCausalLM.from_pretrained(base))
    )
    with caplog.at_level(logging.WARNING):
        report = apply_init(model, folder, step_size=0.1)
    assert any("'base'" in note and note in caplog.text for note in report.notes)
    apply_init(plain, folder, step_size=0.1)
    assert_same_tensors(adapter_weights(model), adapter_weights(plain))
    refuses(BaseModelMismatchError, "it is .other.", lora_model(model=load_quantised(other, bits)), folder)
    nameless = load_quantised(base, bits)
    nameless.config._name_or_path = ""
    refuses(BaseModelMismatchError, "name", lora_model(model=nameless), folder)
