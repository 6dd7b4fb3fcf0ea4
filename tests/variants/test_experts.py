"""Experts of a mixture: each is a layer of its own, with the tokens that are routed to it."""

import json

import pytest
import torch
from families.zoo import EXPERTS, FAMILIES, send_nothing_to_the_last_expert
from harness import (
    EIGHT,
    Adapter,
    assert_initialized,
    assert_statistics_equal,
    chosen,
    collate,
    forge_manifest,
    make_config,
    make_learnable_samples,
    stored_statistics,
)
from harness import make_lora_config as lora_config
from peft import PeftModel, get_peft_model

from lora_da_hf import initialize_lora_da
from lora_da_hf.adapters.targets import find_targets
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ArtifactError, UnsupportedSetupError
from lora_da_hf.pipeline.base_model import base_model_facts

EXPERT_LAYERS = 2 * 2 * 4


def make_mixtral(**lora):
    return get_peft_model(FAMILIES["Mixtral (experts)"].make_model(), lora_config(**{**EXPERTS, **lora}))


def initialize(model, folder, batch_size=4, samples=None):
    report = initialize_lora_da(
        model,
        samples or make_learnable_samples(16),
        config=make_config(**EIGHT),
        data_collator=collate,
        batch_size=batch_size,
        output_dir=folder,
        progress=False,
    )
    return report, stored_statistics(folder)


def test_the_statistics_of_experts_do_not_depend_on_batching(tmp_path):
    found = [initialize(make_mixtral(), tmp_path / str(size), size) for size in (1, 4)]
    assert [report.batch_size for report, _ in found] == [1, 4]
    assert sum("[" in layer.name for layer in found[1][0].layers) == EXPERT_LAYERS
    assert_statistics_equal(found[1][1], found[0][1], 1e-4)
    for name, statistics in found[0][1].items():
        assert statistics.num_input_tokens == found[1][1][name].num_input_tokens, name


def test_a_forward_of_the_experts_own_is_put_back(tmp_path):
    model = make_mixtral()
    found = [module for module in model.modules() if type(module).__name__ == "MixtralExperts"]
    experts, others = found[0], found[1:]
    calls, original = [], experts.forward

    def patched(*args):
        calls.append(1)
        return original(*args)

    experts.forward = patched
    initialize(model, tmp_path)
    assert experts.forward is patched
    assert others
    assert not any("forward" in vars(module) for module in others)
    before = len(calls)
    model(**collate(make_learnable_samples(2)))
    assert len(calls) == before + 1


def test_each_expert_counts_the_tokens_that_are_routed_to_it(tmp_path):
    """Two of four experts a token: both together count every token twice."""
    samples = make_learnable_samples(16)
    _, statistics = initialize(make_mixtral(), tmp_path, samples=samples)
    tokens = sum(len(sample["input_ids"]) for sample in chosen(samples))
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts.base_layer"):
        counts = [statistics[f"{layer}[{index}]"].num_input_tokens for index in range(4)]
        assert sum(counts) == 2 * tokens
        assert max(counts) < tokens


def test_experts_whose_adapter_has_a_copy_in_an_optimizer_are_refused():
    model = make_mixtral()
    parameters = [p for name, p in model.named_parameters() if "experts.lora_B" in name]
    assert parameters
    parameters[0]._hp_mapping = None  # as DeepSpeed's ZeRO-1 and 2 mark the parameters that they have copies of
    with pytest.raises(UnsupportedSetupError, match=r"mlp\.experts: the experts of target_parameters"):
        find_targets(model)


@pytest.mark.support("PEFT", "Experts that no token is routed to", "keep PEFT's own initialisation and are listed")
def test_an_expert_without_tokens_keeps_its_initialisation_and_is_listed(tmp_path):
    model = make_mixtral()
    for layer in model.get_base_model().model.layers:
        router = layer.mlp.gate
        router.register_forward_hook(send_nothing_to_the_last_expert)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report, _ = initialize(model, tmp_path)
    unused = {name for name in report.kept if name.endswith("[3]")}
    assert len(unused) == 4
    assert {report.kept[name] for name in unused} == {"no token is routed to it"}
    assert_initialized(tmp_path, Adapter.of(model), report, kept=("mlp.gate", "[3]"))
    rank = 4
    for name, parameter in model.named_parameters():
        if "experts" in name and "lora_A" in name:
            assert torch.equal(parameter[3 * rank :], before[name][3 * rank :])
            assert not torch.equal(parameter[: 3 * rank], before[name][: 3 * rank])
        if "experts" in name and "lora_B" in name:
            assert not parameter[:, 3::4].any()
            assert parameter[:, 0::4].any()


RANKS = {"experts.gate_up_proj": 2, r"layers\.1\..*experts\.down_proj": 3, "q_proj": 5}
ALPHAS = {name: 4 * rank for name, rank in RANKS.items()}


@pytest.mark.support(
    "PEFT", "Experts with `rank_pattern`, `alpha_pattern`", "keys are `<module>.<parameter>`, all experts of one alike"
)
# PEFT 0.21 says that keys of parameters match nothing, and uses them all the same, seen 2026-11
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_experts_with_ranks_of_their_own_are_written_and_read(tmp_path):
    samples = make_learnable_samples(16)
    model = make_mixtral(rank_pattern=RANKS, alpha_pattern=ALPHAS)
    report, _ = initialize(model, tmp_path, samples=samples)
    assert_initialized(tmp_path, Adapter.of(model), report, kept=("mlp.gate",))
    assert {layer.rank for layer in report.layers} == {2, 3, 4, 5}
    loaded = PeftModel.from_pretrained(FAMILIES["Mixtral (experts)"].make_model(), tmp_path)
    batch = collate(samples[:4])
    with torch.no_grad():
        found, expected = (m.eval()(**batch).logits for m in (loaded, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank_pattern", {"gate_up_proj": 2, "down_proj": 2}, "rank_pattern"),
        ("alpha_pattern", {"gate_up_proj": 2, "down_proj": 2}, "alpha_pattern"),
        ("target_parameters", ["mlp.gate.weight"], r"experts\[0\] no rank"),
    ],
)
def test_a_config_that_gives_experts_other_ranks_than_the_manifest_is_refused(tmp_path, key, value, message):
    initialize(make_mixtral(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    forge_manifest(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_init(tmp_path)


def test_step_zero_of_experts_is_that_of_the_search(tmp_path):
    report, _ = initialize(make_mixtral(), tmp_path)
    tried = dict(report.search)
    assert report.search_loss_after == pytest.approx(tried[report.step_size], rel=1e-4)
    assert report.search_loss_after < report.search_loss_before


def test_the_fingerprint_of_the_base_does_not_see_the_adapters_of_experts():
    expected = base_model_facts(FAMILIES["Mixtral (experts)"].make_model()).weights_sha256
    assert base_model_facts(make_mixtral()).weights_sha256 == expected
    few = make_mixtral(target_parameters=["experts.down_proj"])
    assert base_model_facts(few).weights_sha256 == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer: setattr(layer, "_did_swap_in_out_features", False),
            "is given by PEFT to the side of its outputs",
        ),
        (lambda layer: setattr(layer.get_base_layer(), "_is_expert_parallel", True), "is run in a way"),
        (
            lambda layer: setattr(layer.get_base_layer(), "has_gate", False),
            "is not run by transformers' experts interface",
        ),
    ],
)
def test_experts_that_cannot_be_run_one_by_one_are_listed(change, reason):
    model = make_mixtral()
    inner = model.get_base_model().model.layers[0].mlp.experts.base_layer  # that of gate_up_proj
    change(inner)
    kept = find_targets(model).kept
    assert reason in kept["model.layers.0.mlp.experts.base_layer"]
    assert "model.layers.1.mlp.experts.base_layer" not in kept
