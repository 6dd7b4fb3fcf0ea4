"""The folder of an initialisation: what is in it, what PEFT makes of it, and when it is replaced."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers.integrations.peft
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    collate,
    initialize,
    make_config,
    make_lora_config,
    measured_tensors,
    relative_error,
    written_adapter,
)
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from lora_da_hf import apply_init
from lora_da_hf.artifacts.manifest import BASIS_FILE, MANIFEST_FILE, parse_manifest
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.artifacts.tensors import save_statistics
from lora_da_hf.errors import ConfigError, TargetError
from lora_da_hf.records import LayerStatistics, UpperTriangle


def logits(model, samples):
    batch = {name: value for name, value in collate(samples).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# What is in it


def test_the_folder_holds_an_adapter_a_basis_and_a_manifest_that_all_may_read(tmp_path, lora_model, samples):
    (tmp_path / "file").touch()
    initialize(lora_model(), samples, tmp_path / "init")
    expected = {"adapter_config.json", "adapter_model.safetensors", BASIS_FILE, MANIFEST_FILE}
    assert {path.name for path in (tmp_path / "init").iterdir()} == expected
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    expected.add("lora_da_statistics-00001-of-00001.safetensors")
    assert {path.name for path in (tmp_path / "init").iterdir()} == expected
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "init").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode & 0o777}
    assert {path.name for path in tmp_path.iterdir()} == {"init", "file"}


def test_the_manifest_is_the_report(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", max_rank=6)
    text = (tmp_path / "init" / MANIFEST_FILE).read_bytes()
    manifest = parse_manifest(text, source="here")
    assert manifest.to_json().encode() == text
    assert (manifest.config, manifest.versions["peft"]) == (make_config(max_rank=6), peft.__version__)
    stored = {**manifest.report.to_dict(), "artifact": report.artifact, "seconds": None, "notes": None}
    assert stored == {**report.to_dict(), "seconds": None, "notes": None}
    assert str(tmp_path) not in text.decode()
    shared = {name.rsplit(".", 1)[-1]: layer.shares_input_with for name, layer in manifest.layers.items()}
    assert shared["k_proj"] == shared["v_proj"] == "model.layers.1.self_attn.q_proj"
    assert not any(
        "".join(str(sample["input_ids"][:4]).split()) in "".join(text.decode().split()) for sample in samples
    )


def test_the_same_inputs_give_the_same_files(tmp_path, lora_model, samples):
    for name in ("one", "two"):
        torch.rand(3)
        initialize(lora_model(), samples, tmp_path / name, save_statistics=True)
    one, two = (load_init(tmp_path / name).manifest.files for name in ("one", "two"))
    assert one == two


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


def test_modules_that_peft_saves_by_the_end_of_their_names_can_be_read_again(tmp_path, lora_model, samples):
    model = lora_model(target_modules=["q_proj"], modules_to_save=["norm"])
    assert any("input_layernorm.modules_to_save" in name for name, _ in model.named_parameters())
    initialize(model, samples, tmp_path / "init")
    load_init(tmp_path / "init")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_weights_that_are_trained_together_can_be_read_again(tmp_path, tiny_llama, lora_model, samples, saved):
    def adapted():
        model = tiny_llama(tie_word_embeddings=True)
        return lora_model(model=model, modules_to_save=list(saved), ensure_weight_tying=True, task_type="CAUSAL_LM")

    initialize(adapted(), samples, tmp_path / "init")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "init" / "adapter_model.safetensors")
    assert len(apply_init(adapted(), tmp_path / "init").layers) == LINEAR_LAYERS


def test_an_adapter_that_calls_its_base_otherwise_is_stored_under_the_bases_name(
    tmp_path, tiny_llama, lora_model, samples
):
    model = lora_model(model=tiny_llama(name_or_path="user/base"))
    model.peft_config["default"].base_model_name_or_path = "other"
    initialize(model, samples, tmp_path / "init")
    assert PeftConfig.from_pretrained(tmp_path / "init").base_model_name_or_path == "user/base"
    load_init(tmp_path / "init")


def test_an_adapter_of_another_name_is_stored_like_any_other(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model()
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    initialize(model, samples, tmp_path / "init", step_size=0.1)
    assert load_init(tmp_path / "init").report.adapter_name == "second"
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
    assert any(note.startswith("reusing") for note in initialize(again, samples, tmp_path / "init").notes)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_of_their_own_are_stored_with_the_scaling_that_r_and_alpha_alone_tell(
    tmp_path, tiny_llama, lora_model, samples, use_rslora
):
    def alpha(rank):
        return 4 * (rank**0.5 if use_rslora else rank)

    patterns = {
        "rank_pattern": {r"layers\.1\..*v_proj": 16, "o_proj": 50},
        "alpha_pattern": {r"layers\.1\..*v_proj": alpha(16), "o_proj": alpha(50)},
    }
    model = lora_model(r=4, lora_alpha=alpha(4), use_rslora=use_rslora, **patterns)
    report = initialize(model, samples, tmp_path / "init", step_size=0.1)
    assert {layer.peft_scaling for layer in report.layers} == {4.0}
    assert set(report.kept) == {f"model.layers.{number}.self_attn.o_proj" for number in range(2)}
    config = json.loads((tmp_path / "init" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (50, pytest.approx(alpha(50)))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    layers = [layer for layer in loaded.modules() if hasattr(layer, "lora_A") and hasattr(layer, "scaling")]
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([4.0] * LINEAR_LAYERS)
    assert {layer.r["default"] for layer in layers} == {4, 16, 50}
    assert torch.equal(logits(loaded, samples), logits(model, samples))
    stored = load_init(tmp_path / "init")
    written = written_adapter(tmp_path / "init")
    for name, layer in stored.manifest.layers.items():
        basis = stored.bases[name]
        lora_A, lora_B = (written[f"base_model.model.{name}.lora_{factor}.weight"] for factor in ("A", "B"))
        update = config["lora_alpha"] / (config["r"] ** 0.5 if use_rslora else config["r"]) * lora_B @ lora_A
        assert relative_error(update, 0.1 * basis.basis_B[:, : layer.rank] @ basis.basis_A[: layer.rank]) < 1e-5
    again = lora_model(r=4, lora_alpha=alpha(4), use_rslora=use_rslora, **patterns)
    assert any(
        note.startswith("reusing") for note in initialize(again, samples, tmp_path / "init", step_size=0.1).notes
    )


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"v_proj": 2}}, {"alpha_pattern": {"v_proj": 3}}])
def test_layers_of_several_scalings_are_refused_before_any_work(tmp_path, lora_model, samples, pattern):
    with pytest.raises(TargetError, match=r"model\.layers\.0\.self_attn\.v_proj has scaling"):
        initialize(lora_model(**pattern), samples, tmp_path / "init")
    assert not (tmp_path / "init").exists()
    assert len(initialize(lora_model(**pattern), samples).layers) == LINEAR_LAYERS


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": r".*layers\.0.*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "layers_to_transform": 0, "exclude_modules": ["o_proj"]},
    ],
)
def test_what_peft_matches_by_more_than_names_is_stored_by_names(tmp_path, tiny_llama, lora_model, samples, lora):
    model = lora_model(**lora, revision="main")
    initialize(model, samples, tmp_path / "init")
    assert load_init(tmp_path / "init").peft_config["revision"] is None
    names = [f"model.layers.0.self_attn.{which}_proj" for which in "qv"]
    assert sorted(PeftConfig.from_pretrained(tmp_path / "init").target_modules) == names
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    assert torch.equal(logits(loaded, samples), logits(model, samples))


# When it is replaced


@pytest.mark.parametrize("function", ["lora_da_hf.artifacts.tensors.save_file", "pathlib.Path.rename"])
def test_a_failure_while_writing_leaves_the_old_folder_and_the_old_adapter(
    tmp_path, lora_model, samples, monkeypatch, function
):
    initialize(lora_model(), samples, tmp_path / "init")
    before, model = contents(tmp_path / "init"), lora_model(r=2)
    weights, rename = adapter_weights(model), Path.rename

    def fails(first, *args, **kwargs):
        if isinstance(first, dict) or first.name == "new":  # tensors to save, or the folder that is to be swapped in
            raise OSError("no space left on device")
        return rename(first, *args)

    monkeypatch.setattr(function, fails)
    with pytest.raises(OSError, match="no space left on device"):
        initialize(model, samples, tmp_path / "init")
    assert contents(tmp_path / "init") == before
    assert [path.name for path in tmp_path.iterdir()] == ["init"]
    assert_same_tensors(adapter_weights(model), weights)


def test_behind_a_link_what_it_leads_to_is_replaced(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "disk" / "init")
    (tmp_path / "init").symlink_to(tmp_path / "disk" / "init")
    initialize(lora_model(r=2), samples, tmp_path / "init")
    assert (tmp_path / "init").is_symlink()
    assert {entry.rank for entry in load_init(tmp_path / "disk" / "init").manifest.layers.values()} == {2}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["init"]


@pytest.mark.parametrize("name", ["README.md", "loss.png", "LICENSE", "model.safetensors", ".git"])
def test_what_is_not_of_an_initialisation_is_never_replaced(tmp_path, lora_model, samples, name):
    folder = tmp_path / "init"
    initialize(lora_model(), samples, folder, save_statistics=True)
    initialize(lora_model(r=2), samples, folder)
    assert {layer.rank for layer in load_init(folder).report.layers} == {2}
    assert {path.name for path in folder.iterdir()} == {*load_init(folder).manifest.files, MANIFEST_FILE}
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}"):
        initialize(lora_model(r=3), samples, folder)
    assert (folder / name).read_text() == "mine"
    with pytest.raises(ConfigError, match="is not a folder"):
        initialize(lora_model(r=3), samples, folder / name)


def test_statistics_are_written_in_files_of_a_bounded_size(tmp_path):
    generator, width = torch.Generator().manual_seed(0), 200
    moment = UpperTriangle.zeros(width, dtype=torch.float32, device=torch.device("cpu"))
    moment.entries.normal_(generator=generator)
    statistics = {
        f"layer{k}": LayerStatistics(
            input_second_moment=moment,
            output_grad_second_moment_diag=torch.rand(8, generator=generator),
            weight_grad=torch.randn(8, width, generator=generator),
            num_input_tokens=1,
            num_output_tokens=1,
            input_mean=torch.rand(width, generator=generator),
        )
        for k in range(12)
    }
    with measured_tensors() as peak:
        save_statistics(tmp_path, statistics, {name: name for name in statistics}, part=0, shard_bytes=200_000)
    files = [load_file(path) for path in sorted(tmp_path.iterdir())]
    assert [len(tensors) for tensors in files] == [12, 12, 12, 12]  # three layers in each
    found = {key: tensor for tensors in files for key, tensor in tensors.items()}
    for name, layer in statistics.items():
        assert torch.equal(found[f"{name}.input_second_moment"], moment.packed())
        assert torch.equal(found[f"{name}.weight_grad"], layer.weight_grad)
        assert torch.equal(found[f"{name}.output_grad_second_moment_diag"], layer.output_grad_second_moment_diag)
    assert peak[0] < 5 * found["layer0.input_second_moment"].nbytes
