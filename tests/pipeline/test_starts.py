"""Every start: from data, from stored statistics, and at another rank."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from harness import (
    STORED_RANK,
    change_tensors,
    forge_manifest,
    initialize,
    make_learnable_samples,
    make_lora_config,
    store_init,
    written_adapter,
    written_updates,
)
from oracles import autograd_statistics, collate, lora_layers, model_loss
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_da_hf import LoRADAConfig, apply_init, load_init, refit_init
from lora_da_hf.errors import ArtifactError, ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import demo_model

STARTS = ["gradient", "whitened_gradient", "inputs"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the folder of LoRA-DA's own start, with the statistics."""
    from conftest import make_lora_model

    return store_init(tmp_path_factory.mktemp("stored") / "init", make_lora_model(r=STORED_RANK))


@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_data_lowers_the_loss_or_leaves_it(tmp_path, lora_model, tiny_llama, start):
    model = lora_model(r=STORED_RANK)
    report = initialize(model, make_learnable_samples(64), tmp_path / "init", start=start, step_size="line_search")
    assert start in str(report)
    if start == "inputs":
        assert report.step_size == 0
        assert report.search == []
        assert any("B is zero" in note for note in report.notes)
    else:
        assert report.unseen_loss_after < report.unseen_loss_before
        assert "all layers equally far" in str(report) or start == "whitened_gradient"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    for name, basis in load_init(tmp_path / "init").bases.items():
        lora_A = lora_layers(loaded)[name].lora_A["default"].weight
        torch.testing.assert_close(3**0.5 * lora_A, basis.basis_A[:STORED_RANK], atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_stored_statistics_is_that_from_data(stored, tmp_path, lora_model, start):
    refitted = refit_init(stored, tmp_path / "new", config={"start": start, "save_statistics": True})
    initialize(lora_model(r=STORED_RANK), make_learnable_samples(24), tmp_path / "init", start=start, max_rank=16)
    for name, basis in load_init(tmp_path / "init").bases.items():
        torch.testing.assert_close(refitted.bases[name].basis_A, basis.basis_A, atol=1e-4, rtol=0)
        torch.testing.assert_close(refitted.bases[name].basis_B, basis.basis_B, atol=1e-4, rtol=0)
    moved = [
        sum(u.norm().item() ** 2 for u in written_updates_of(folder).values()) for folder in (stored, tmp_path / "new")
    ]
    if start == "inputs":
        assert refitted.report.step_size == moved[1] == 0
        assert all(tensor.any() for name, tensor in written_adapter(tmp_path / "new").items() if "lora_A" in name)
        with pytest.raises(ConfigError, match="step_size"):
            refit_init(tmp_path / "new", tmp_path / "back", config={"start": "gradient"})
    else:
        assert moved[0] == pytest.approx(moved[1], rel=1e-4)
        refit_init(stored, tmp_path / "given", step_size=0.1, config={"save_statistics": True})
        with pytest.raises(ConfigError, match="step_size"):
            refit_init(tmp_path / "given", tmp_path / "again", config={"start": start})


def written_updates_of(folder):
    from conftest import make_tiny_llama

    return written_updates(PeftModel.from_pretrained(make_tiny_llama(), folder))


@pytest.mark.parametrize("start", STARTS)
def test_a_stored_start_is_applied_at_another_rank(stored, tmp_path, lora_model, start):
    refit_init(stored, tmp_path / "new", config={"start": start}, step_size=None if start == "inputs" else 0.1)
    model = lora_model(r=3)
    report = apply_init(model, tmp_path / "new", samples=make_learnable_samples(64), data_collator=collate)
    assert (report.step_size == 0) == (start == "inputs")
    for name, basis in load_init(tmp_path / "new").bases.items():
        lora_A = lora_layers(model)[name].lora_A["default"].weight
        torch.testing.assert_close(3**0.5 * lora_A, basis.basis_A[:3], atol=1e-5, rtol=0)


def inputs_beside_eva(folder, make_model, samples):
    """Return for each layer the least cosine of principal angles: ours to the exact covariance, and EVA's to ours."""
    model = get_peft_model(make_model(), make_lora_config(r=4))
    initialize(model, samples, folder, start="inputs", num_samples=len(samples), search_samples=0)
    exact = autograd_statistics(get_peft_model(make_model(), make_lora_config(r=4)), samples, model_loss)
    eva = EvaConfig(rho=1.0, use_label_mask=False)
    theirs = get_peft_model(
        make_model(), make_lora_config(r=4, init_lora_weights="eva", eva_config=eva), low_cpu_mem_usage=True
    )
    batches = [collate(samples)] * 4  # its sums over several batches forget what was not among the leading directions
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    for name, layer in lora_layers(model).items():
        x = exact[name]
        leading = torch.linalg.eigh(x.input_second_moment - torch.outer(x.input_mean, x.input_mean)).eigenvectors[
            :, -4:
        ]
        ours, peft = (model.lora_A["default"].weight.double().mT for model in (layer, lora_layers(theirs)[name]))
        bases = [torch.linalg.qr(columns).Q for columns in (leading, ours, peft)]
        yield [torch.linalg.svdvals(bases[1].mT @ bases[k]).min().item() for k in (0, 2)]


def test_inputs_are_those_of_eva(tmp_path, tiny_llama):
    for ours, eva in inputs_beside_eva(tmp_path / "init", tiny_llama, make_learnable_samples(32)):
        assert ours >= 1 - 1e-6
        assert eva >= 0.99


@pytest.mark.slow
def test_inputs_of_a_pretrained_model_are_those_of_eva_but_for_its_randomised_decomposition(tmp_path):
    folder = demo_model.fetch_model(Path(__file__).parents[2] / ".cache/smollm2-135m-instruct")
    ids = AutoTokenizer.from_pretrained(folder)(Path(inspect.__file__).read_text())["input_ids"]
    rows = [ids[start : start + 96] for start in range(0, 16 * 96, 96)]
    samples = [{"input_ids": row, "labels": row, "attention_mask": [1] * 96} for row in rows]
    found = list(inputs_beside_eva(tmp_path / "init", lambda: AutoModelForCausalLM.from_pretrained(folder), samples))
    assert min(ours for ours, _ in found) >= 1 - 1e-6
    assert sum(eva >= 0.99 for _, eva in found) >= 0.9 * len(found)


def test_another_start_needs_the_statistics(tmp_path, lora_model):
    initialize(lora_model(), make_learnable_samples(24), tmp_path / "init", step_size=0.1)
    with pytest.raises(ArtifactError, match="save_statistics"):
        refit_init(tmp_path / "init", tmp_path / "new", config={"start": "gradient"}, step_size=0.1)


def test_a_start_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="start='eva'"):
        LoRADAConfig(start="eva")


@pytest.mark.parametrize("offline", [False, True])
def test_leading_directions_give_every_start_without_the_statistics(stored, tmp_path, lora_model, offline):
    small = tmp_path / "small"
    if offline:
        refit_init(stored, small, config={"save_statistics": "leading"})
    else:
        store_init(small, lora_model(r=STORED_RANK), save_statistics="leading")
    assert not load_init(small).manifest.statistics_files
    for start in STARTS:
        step = {} if start == "inputs" else {"step_size": 0.1}
        whole = refit_init(stored, tmp_path / f"{start}_whole", config={"start": start}, rank=4, **step)
        found = refit_init(small, tmp_path / start, config={"start": start}, rank=4, **step)
        assert not found.manifest.leading_files
        updates = written_updates_of(tmp_path / f"{start}_whole")
        for name, update in written_updates_of(tmp_path / start).items():
            assert (update - updates[name]).norm() <= 0.03 * updates[name].norm()
            bases = [torch.linalg.qr(init.bases[name].basis_A[:4].mT).Q for init in (found, whole)]
            assert torch.linalg.svdvals(bases[0].mT @ bases[1]).min() > 0.999
    with pytest.raises(ArtifactError, match="save_statistics"):
        refit_init(small, tmp_path / "damped", config={"input_damping": 1.0})
    with pytest.raises(ConfigError, match="would be lost"):
        refit_init(small, small, config={"start": "gradient"}, step_size=0.1)
    assert refit_init(small, small, rank=2, step_size=0.1).manifest.leading_files


def test_damaged_leading_directions_are_refused(stored, tmp_path):
    refit_init(stored, tmp_path / "small", config={"save_statistics": "leading"})
    path = tmp_path / "small" / load_init(tmp_path / "small").manifest.leading_files[0]
    change_tensors(path, lambda tensors: tensors.popitem())
    forge_manifest(tmp_path / "small")
    with pytest.raises(ArtifactError, match="lora_da_leading"):
        load_init(tmp_path / "small")
