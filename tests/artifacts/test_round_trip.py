import errno
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers.integrations.peft
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    base_linear_layers,
    collate,
    forge_manifest,
    make_config,
    make_learnable_samples,
    make_lora_config,
    relative_error,
    written_adapter,
)
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

import lora_da_hf.pipeline.base_model
import lora_da_hf.pipeline.run
import lora_da_hf.pipeline.save
from lora_da_hf import apply_init, initialize_lora_da
from lora_da_hf.adapters.targets import find_targets
from lora_da_hf.artifacts.folders import atomic_folder, check_writable
from lora_da_hf.artifacts.manifest import BASIS_FILE, MANIFEST_FILE, REPORT_FILE, parse_manifest
from lora_da_hf.artifacts.statistics_store import adopt_statistics, load_statistics, save_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ArtifactError, ConfigError, TargetError
from lora_da_hf.hub.cards import render_card
from lora_da_hf.theory.adapter_factors import split_factors
from lora_da_hf.theory.layer_scales import divisors
from lora_da_hf.theory.solve import factorize, solve_layer


@pytest.fixture
def samples():
    return make_learnable_samples(24)


def initialize(model, samples, folder=None, *, adapter_name=None, config=None, **overrides):
    return initialize_lora_da(
        model,
        samples,
        config=config or make_config(**overrides),
        data_collator=collate,
        output_dir=folder,
        adapter_name=adapter_name,
        progress=False,
    )


def logits(model, samples):
    batch = {name: value for name, value in collate(samples).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


# The folder


def test_the_folder_holds_an_adapter_a_basis_a_report_and_a_manifest(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init")
    expected = {"adapter_config.json", "adapter_model.safetensors", BASIS_FILE, REPORT_FILE, MANIFEST_FILE}
    assert {path.name for path in (tmp_path / "init").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_statistics_are_there_on_request(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    assert (tmp_path / "init" / "lora_da_statistics-00001-of-00001.safetensors").is_file()


def test_the_files_can_be_read_by_whom_the_umask_lets(tmp_path, lora_model, samples):
    before = os.umask(0o022)
    try:
        initialize(lora_model(), samples, tmp_path / "init")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "init").iterdir()} == {"0o644"}
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


def test_the_manifest_says_what_was_done(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", max_rank=6)
    manifest = load_init(tmp_path / "init").manifest
    assert manifest.config == make_config(max_rank=6)
    assert manifest.adapter_name == "default"
    assert manifest.report.step_size == report.step_size
    assert manifest.report.step_size_by_rank == {str(rank): step for rank, step in report.step_size_by_rank.items()}
    assert set(manifest.report.step_size_by_rank) == {"1", "4", "6"}
    assert manifest.report.seed == 42
    assert manifest.versions["peft"] == peft.__version__
    assert manifest.report.num_samples == 12
    assert manifest.report.population_size == 24
    assert manifest.report.data_fingerprint == report.data_fingerprint
    assert len(manifest.layers) == LINEAR_LAYERS
    for layer in report.layers:
        entry = manifest.layers[layer.name]
        assert (entry.rank, entry.max_rank, entry.peft_scaling) == (4, 6, 4.0)
        assert (entry.num_tokens, entry.num_grad_tokens) == (layer.num_tokens, layer.num_grad_tokens)
        assert (entry.input_damping, entry.output_damping) == (layer.input_damping, layer.output_damping)
    shared = {name.rsplit(".", 1)[-1]: entry.shares_input_with for name, entry in manifest.layers.items()}
    assert shared["k_proj"] == shared["v_proj"] == "model.layers.1.self_attn.q_proj"
    assert shared["up_proj"] == "model.layers.1.mlp.gate_proj"


def test_modules_that_peft_saves_by_the_end_of_their_names_can_be_read_again(tmp_path, lora_model, samples):
    model = lora_model(target_modules=["q_proj"], modules_to_save=["norm"])
    assert any("input_layernorm.modules_to_save" in name for name, _ in model.named_parameters())
    report = initialize(model, samples, tmp_path / "init")
    assert not any("cannot be read again" in note for note in report.notes)
    load_init(tmp_path / "init")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_weights_that_are_trained_together_can_be_read_again(tmp_path, tiny_llama, lora_model, samples, saved):
    def adapted():
        model = tiny_llama(tie_word_embeddings=True)
        return lora_model(model=model, modules_to_save=list(saved), ensure_weight_tying=True, task_type="CAUSAL_LM")

    report = initialize(adapted(), samples, tmp_path / "init")
    assert not any("cannot be read again" in note for note in report.notes)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "init" / "adapter_model.safetensors")
    assert len(apply_init(adapted(), tmp_path / "init").layers) == LINEAR_LAYERS


def test_what_is_no_copy_of_a_tied_weight_is_refused(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model(
        model=tiny_llama(tie_word_embeddings=True),
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    initialize(model, samples, tmp_path / "init")
    path = tmp_path / "init" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    forge_manifest(tmp_path / "init")
    with pytest.raises(ArtifactError, match=r"lm_head\.weight' is no tensor of this adapter"):
        load_init(tmp_path / "init")


def test_an_adapter_that_calls_its_base_otherwise_is_stored_under_the_bases_name(
    tmp_path, tiny_llama, lora_model, samples
):
    model = lora_model(model=tiny_llama(name_or_path="user/base"))
    model.peft_config["default"].base_model_name_or_path = "other"
    report = initialize(model, samples, tmp_path / "init")
    assert not any("cannot be read again" in note for note in report.notes)
    assert PeftConfig.from_pretrained(tmp_path / "init").base_model_name_or_path == "user/base"
    load_init(tmp_path / "init")


def test_what_cannot_be_read_again_is_told_at_once(tmp_path, lora_model, samples, monkeypatch, caplog):
    def fail(*_, **__):
        raise ArtifactError("no good")

    monkeypatch.setattr(lora_da_hf.pipeline.run, "load_init", fail)
    report = initialize(lora_model(), samples, tmp_path / "init")
    assert "what was stored cannot be read again, so it is of no use beyond this training (no good)" in report.notes
    assert "LoRA-DA: what was stored cannot be read again" in caplog.text


def test_the_manifest_and_the_report_do_not_hold_any_sample(tmp_path, lora_model, samples):
    marked = [{**sample, "input_ids": [*sample["input_ids"]]} for sample in samples]
    initialize(lora_model(), marked, tmp_path / "init")
    for file in (MANIFEST_FILE, REPORT_FILE):
        text = "".join((tmp_path / "init" / file).read_text().split())
        assert not any(",".join(map(str, sample["input_ids"][:4])) in text for sample in marked)


def test_a_manifest_is_the_same_after_writing_and_reading(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init")
    text = (tmp_path / "init" / MANIFEST_FILE).read_bytes()
    assert parse_manifest(text, source="here").to_json().encode() == text


# To the bit


def test_the_stored_basis_is_that_of_the_solve_and_gives_the_adapter_to_the_bit(tmp_path, lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, tmp_path / "init", max_rank=6)
    stored = load_init(tmp_path / "init")
    written = written_adapter(tmp_path / "init")
    assert_same_tensors(written, adapter_weights(model))
    for layer in report.layers:
        basis = stored.bases[layer.name]
        assert basis.eigenvalues.tolist() == layer.eigenvalues
        assert basis.basis_A.shape[0] == basis.basis_B.shape[1] == 6
        lora_A, lora_B = split_factors(
            basis.basis_A[:4].double(),
            basis.basis_B[:, :4].double(),
            peft_scaling=layer.peft_scaling,
            step_size=report.step_size,
            factor_split="default_norm",
        )
        name = f"base_model.model.{layer.name}"
        torch.testing.assert_close(written[f"{name}.lora_A.weight"], lora_A.float(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(written[f"{name}.lora_B.weight"], lora_B.float(), rtol=1e-6, atol=1e-8)


def test_the_tensors_of_the_basis_file_are_what_is_loaded(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init")
    raw = load_file(tmp_path / "init" / BASIS_FILE)
    loaded = {
        f"{name}.{field}": getattr(basis, field)
        for name, basis in load_init(tmp_path / "init").bases.items()
        for field in ("basis_A", "basis_B", "eigenvalues")
    }
    assert_same_tensors(loaded, raw)


def test_the_same_inputs_give_the_same_files(tmp_path, lora_model, samples):
    for name in ("one", "two"):
        torch.rand(3)
        initialize(lora_model(), samples, tmp_path / name, save_statistics=True)
    one, two = (load_init(tmp_path / name).manifest.files for name in ("one", "two"))
    assert {name: entry for name, entry in one.items() if name != REPORT_FILE} == {
        name: entry
        for name, entry in two.items()
        if name != REPORT_FILE  # which holds times
    }


def test_the_stored_statistics_give_the_basis_again(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", save_statistics=True, max_rank=6)
    stored = load_init(tmp_path / "init")
    statistics = load_statistics(stored.folder, stored.manifest)
    config = stored.manifest.config
    assert set(statistics) == {layer.name for layer in report.layers}
    by_layer = divisors(report.layers, report.step_unit, layer_steps=config.layer_steps)
    attention = [statistics[f"model.layers.0.self_attn.{which}_proj"].input_second_moment for which in "qkv"]
    assert attention[0] is attention[1] is attention[2]
    for name, layer in statistics.items():
        solution = solve_layer(
            layer, factorize(layer, config, layer=name), config, layer=name, rank=6, population_size=24
        ).in_unit(by_layer[name])
        basis = stored.bases[name]
        assert torch.equal(solution.basis_A.float(), basis.basis_A)
        assert torch.equal(solution.basis_B.float(), basis.basis_B)
        assert torch.equal(solution.eigenvalues, basis.eigenvalues)


def test_statistics_in_float64_are_stored_in_float64(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True, accumulate_dtype="float64")
    stored = load_init(tmp_path / "init")
    for layer in load_statistics(stored.folder, stored.manifest).values():
        assert layer.input_second_moment.dtype == layer.weight_grad.dtype == torch.float64


def test_statistics_in_several_shards_are_read_as_one(tmp_path, lora_model, samples, monkeypatch):
    initialize(lora_model(), samples, tmp_path / "whole", save_statistics=True)
    monkeypatch.setattr("lora_da_hf.artifacts.statistics_store._SHARD_BYTES", 50_000)
    initialize(lora_model(), samples, tmp_path / "parts", save_statistics=True)
    whole, parts = (load_init(tmp_path / name) for name in ("whole", "parts"))
    assert sum(name.startswith("lora_da_statistics-") for name in parts.manifest.files) > 2
    expected = load_statistics(whole.folder, whole.manifest)
    found = load_statistics(parts.folder, parts.manifest)
    for name, layer in expected.items():
        assert torch.equal(found[name].input_second_moment, layer.input_second_moment)
        assert torch.equal(found[name].weight_grad, layer.weight_grad)
        assert torch.equal(found[name].output_grad_second_moment_diag, layer.output_grad_second_moment_diag)


def test_statistics_that_were_not_stored_are_an_error(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init")
    stored = load_init(tmp_path / "init")
    with pytest.raises(ArtifactError, match="compute it again with save_statistics=True"):
        load_statistics(stored.folder, stored.manifest)


def test_statistics_that_lack_a_tensor_are_an_error(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    stored = load_init(tmp_path / "init")
    statistics = load_statistics(stored.folder, stored.manifest)
    last = max(statistics)
    kept = {name: layer for name, layer in statistics.items() if name != last}
    leaders = {name: layer.shares_input_with for name, layer in stored.manifest.layers.items()}
    (tmp_path / "init" / "lora_da_statistics-00001-of-00001.safetensors").unlink()
    save_statistics(tmp_path / "kept", kept, leaders)
    adopt_statistics(tmp_path / "init", tmp_path / "kept")
    with pytest.raises(ArtifactError, match=r"v_proj.weight_grad is missing and should be \[24, 48\]"):
        load_statistics(stored.folder, stored.manifest)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_smaller_rank_is_a_slice_of_the_basis(tmp_path, lora_model, samples, rank):
    config = {"step_size": 0.1, "max_rank": 6}
    initialize(lora_model(r=6), samples, tmp_path / "large", **config)
    fresh = lora_model(r=rank)
    report = initialize(fresh, samples, tmp_path / "small", step_size=0.1)
    stored = load_init(tmp_path / "large")
    weights = adapter_weights(fresh)
    for layer in report.layers:
        basis = stored.bases[layer.name]
        name = f"base_model.model.{layer.name}"
        lora_A, lora_B = split_factors(
            basis.basis_A[:rank],
            basis.basis_B[:, :rank],
            peft_scaling=layer.peft_scaling,
            step_size=0.1,
            factor_split="default_norm",
        )
        found = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        assert relative_error(found, lora_B @ lora_A) < 1e-5


# The adapter


def test_the_adapter_loads_on_an_untouched_base_to_the_same_logits(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model()
    before = logits(tiny_llama(), samples)
    initialize(model, samples, tmp_path / "init")
    expected = logits(model, samples)
    assert not torch.equal(expected, before)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), expected)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    assert torch.equal(logits(again, samples), expected)


def test_the_adapters_config_is_peft_s_own(tmp_path, lora_model, samples):
    initialize(lora_model(use_rslora=True, rank_pattern={"q_proj": 2}), samples, tmp_path / "init")
    config = PeftConfig.from_pretrained(tmp_path / "init")
    assert config.peft_type == "LORA"
    assert (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern) == (4, 16, True, {"q_proj": 2})


def test_the_base_is_not_touched_and_the_parameters_stay_the_same_objects(tmp_path, lora_model, samples):
    model = lora_model()
    objects = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in objects.items()}
    flags = {name: parameter.requires_grad for name, parameter in objects.items()}
    initialize(model, samples, tmp_path / "init")
    after = dict(model.named_parameters())
    assert set(after) == set(objects)
    assert all(after[name] is objects[name] for name in objects)
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    for name, value in values.items():
        assert torch.equal(after[name], value) == ("lora_" not in name), name


def test_forward_adds_the_scaled_product_to_the_base(lora_model, samples):
    model = lora_model()
    initialize(model, samples)
    for target in find_targets_after(model):
        x = torch.randn(5, target.in_features)
        update = target.peft_scaling * target.lora_B @ target.lora_A
        expected = x @ target.base_layer.weight.T + x @ update.T
        torch.testing.assert_close(target.layer(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(target.layer(x), x @ target.base_layer.weight.T)


def find_targets_after(model):
    """Find the layers of an adapter that is no fresh one any more."""
    factors_B = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    values = {name: parameter.detach().clone() for name, parameter in factors_B.items()}
    with torch.no_grad():
        for parameter in factors_B.values():
            parameter.zero_()
        targets = find_targets(model).targets
        for name, parameter in factors_B.items():
            parameter.copy_(values[name])
    return targets


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_of_another_name_is_stored_like_any_other(tmp_path, tiny_llama, lora_model, samples, named):
    model = lora_model()
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    initialize(model, samples, tmp_path / "init", adapter_name="second" if named else None, step_size=0.1)
    assert load_init(tmp_path / "init").manifest.adapter_name == "second"
    assert {path.name for path in (tmp_path / "init").iterdir() if path.is_dir()} == set()
    assert all(p.any() == ("second" in name) for name, p in model.named_parameters() if "lora_B" in name)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


def test_an_adapter_of_transformers_own_is_stored_too(tmp_path, tiny_llama, samples, monkeypatch):
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda min_version: None)
    model = tiny_llama()
    model.add_adapter(make_lora_config())
    report = initialize(model, samples, tmp_path / "init")
    assert len(report.layers) == LINEAR_LAYERS
    load_init(tmp_path / "init")
    again = tiny_llama()
    again.add_adapter(make_lora_config())
    assert any(note.startswith("found in") for note in initialize(again, samples, tmp_path / "init").notes)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


def test_ranks_and_scalings_are_read_from_each_layer(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model(rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 3}, use_rslora=True)
    report = initialize(model, samples, tmp_path / "init", step_size=0.1)
    layers = {layer.name.rsplit(".", 1)[-1]: layer for layer in report.layers}
    assert (layers["v_proj"].rank, layers["q_proj"].rank) == (7, 4)
    assert layers["v_proj"].peft_scaling == pytest.approx(16 / 7**0.5)
    assert layers["q_proj"].peft_scaling == pytest.approx(3 / 2)
    assert layers["k_proj"].peft_scaling == pytest.approx(16 / 2)
    stored = load_init(tmp_path / "init")
    for target in find_targets_after(model):
        basis = stored.bases[target.name]
        update = target.peft_scaling * (target.lora_B @ target.lora_A)
        expected = 0.1 * basis.basis_B[:, : target.rank] @ basis.basis_A[: target.rank]
        assert relative_error(update.detach(), expected) < 1e-5
        assert basis.basis_A.shape[0] == 7
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


def test_a_rank_above_the_input_size_is_left_to_peft(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model(rank_pattern={"o_proj": 50})
    before = adapter_weights(model)
    report = initialize(model, samples, tmp_path / "init")
    kept = {f"model.layers.{n}.self_attn.o_proj": "rank 50 is above its input size 48" for n in range(2)}
    assert report.kept == kept
    assert load_init(tmp_path / "init").report.kept == kept
    after = adapter_weights(model)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "o_proj" in name}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


# All or nothing


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("lora_da_hf.pipeline.save", "save_adapter"),
        ("lora_da_hf.pipeline.save", "adopt_statistics"),
        ("lora_da_hf.pipeline.resume", "save_statistics"),
        ("lora_da_hf.artifacts.store", "write_tensors"),
        ("lora_da_hf.artifacts.store", "file_entry"),
        ("lora_da_hf.artifacts.folders", "sync"),
    ],
)
def test_a_failure_while_writing_leaves_the_old_folder_and_the_old_adapter(
    tmp_path, lora_model, samples, monkeypatch, module, function
):
    initialize(lora_model(), samples[:20], tmp_path / "init", save_statistics=True)
    before = contents(tmp_path / "init")
    model = lora_model()
    weights = adapter_weights(model)

    def fails(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"{module}.{function}", fails)
    with pytest.raises(OSError, match="no space left on device"):
        initialize(model, samples, tmp_path / "init", save_statistics=True)
    assert contents(tmp_path / "init") == before
    assert [path.name for path in tmp_path.iterdir()] == ["init"]
    assert_same_tensors(adapter_weights(model), weights)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_failure_while_the_folders_are_swapped_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "init"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.rename

    def fails(self, other):
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as partial:
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_a_folder_that_cannot_be_renamed_is_refused_before_and_after_the_pass(tmp_path, monkeypatch):
    target = tmp_path / "init"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.rename

    def fails(self, other):
        if self == target:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, other)

    check_writable(target)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: path == target)
        with pytest.raises(ConfigError, match=r"init cannot be replaced \(a mount point, or"):
            check_writable(target)
    monkeypatch.setattr(Path, "rename", fails)  # as for a mount point
    message = r"init cannot be replaced \(Device or resource busy\). Name a new folder, such as one inside it"
    with pytest.raises(ConfigError, match=message), atomic_folder(target) as partial:
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_behind_a_link_what_it_leads_to_is_replaced(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "disk" / "init")
    (tmp_path / "init").symlink_to(tmp_path / "disk" / "init")
    initialize(lora_model(r=2), samples, tmp_path / "init")
    assert (tmp_path / "init").is_symlink()
    assert {entry.rank for entry in load_init(tmp_path / "disk" / "init").manifest.layers.values()} == {2}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["init"]


def test_a_page_and_pictures_of_ones_own_outlive_a_new_initialisation(tmp_path, lora_model, samples):
    folder = tmp_path / "init"
    initialize(lora_model(), samples, folder)
    own = {"README.md": b"---\neval_results: [1]\n---\n# Mine", "loss.png": b"a picture", "LICENSE": b"MIT"}
    for name, content in {**own, "guidance_spectra.png": b"of the card"}.items():
        (folder / name).write_bytes(content)
    initialize(lora_model(r=2), samples, folder)
    assert {name: (folder / name).read_bytes() for name in own} == own
    assert not (folder / "guidance_spectra.png").exists()
    (folder / "README.md").write_text(render_card(load_init(folder), license=None), encoding="utf-8")
    initialize(lora_model(r=3), samples, folder)
    assert not (folder / "README.md").exists()  # it is not of this one
    assert (folder / "loss.png").exists()


def test_everybody_may_read_what_everybody_may_read(tmp_path, lora_model, samples):
    (tmp_path / "file").touch()
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "init").iterdir()}
    assert any(name.startswith("lora_da_statistics-") for name in modes)
    assert set(modes.values()) == {(tmp_path / "file").stat().st_mode & 0o777}


def test_nothing_is_at_the_target_before_all_of_it_is(tmp_path):
    (tmp_path / "cached").write_text("of the Hub's cache")
    (tmp_path / "cached").chmod(0o600)
    with atomic_folder(tmp_path / "links") as partial:
        (partial / "file").hardlink_to(tmp_path / "cached")
    assert (tmp_path / "cached").stat().st_mode & 0o777 == 0o600  # not ours to change
    with atomic_folder(tmp_path / "deep" / "init") as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "deep" / "init").exists()
    assert (tmp_path / "deep" / "init" / "file").read_text() == "new"


def test_a_new_initialisation_replaces_the_folder(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    initialize(lora_model(r=2), samples, tmp_path / "init")
    assert {entry.rank for entry in load_init(tmp_path / "init").manifest.layers.values()} == {2}
    assert not list((tmp_path / "init").glob("lora_da_statistics-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_a_model_that_peft_cannot_save_is_an_error(tmp_path, lora_model, samples):
    inner = lora_model().get_base_model()
    weights = adapter_weights(inner)
    with pytest.raises(TargetError, match=r"adapter of a LlamaForCausalLM cannot be stored"):
        initialize(inner, samples, tmp_path / "init")
    assert not (tmp_path / "init").exists()
    assert_same_tensors(adapter_weights(inner), weights)


def test_base_facts_of_a_model_are_those_of_its_base(lora_model, tiny_llama):
    model = lora_model()
    facts = lora_da_hf.pipeline.base_model.base_model_facts(model)
    assert facts["config"]["hidden_size"] == 48
    assert facts["config"]["model_type"] == "llama"
    assert len(facts.weights_sha256) == 64
    assert len(base_linear_layers(model)) == LINEAR_LAYERS
