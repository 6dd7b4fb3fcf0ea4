"""Experts of a mixture: each is a layer of its own, with the tokens that are routed to it."""

import pytest
import torch
from families.zoo import FAMILIES, send_nothing_to_the_last_expert
from harness import (
    EIGHT,
    Adapter,
    assert_initialized,
    assert_statistics_equal,
    chosen,
    collate,
    initialize,
    make_learnable_samples,
    stored_statistics,
)
from peft import PeftModel

from lora_da_hf import apply_init
from lora_da_hf.errors import UnsupportedSetupError

EXPERT_LAYERS = 2 * 2 * 4
SAMPLES = make_learnable_samples(16)


def make_mixtral(**lora):
    return FAMILIES["Mixtral (experts)"].adapt(**lora)


def test_the_statistics_of_experts_do_not_depend_on_batching(tmp_path):
    """Two of four experts a token: both together count every token twice."""
    reports = [initialize(make_mixtral(), SAMPLES, tmp_path / str(size), batch_size=size, **EIGHT) for size in (1, 4)]
    single, batched = (stored_statistics(tmp_path / str(size)) for size in (1, 4))
    assert [report.batch_size for report in reports] == [1, 4]
    assert sum("[" in layer.name for layer in reports[1].layers) == EXPERT_LAYERS
    assert_statistics_equal(batched, single, 1e-4)
    tokens = sum(len(sample["input_ids"]) for sample in chosen(SAMPLES))
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts.base_layer"):
        counts = [[found[f"{layer}[{index}]"].num_input_tokens for index in range(4)] for found in (single, batched)]
        assert counts[0] == counts[1]
        assert sum(counts[0]) == 2 * tokens
        assert max(counts[0]) < tokens
    tried = dict(reports[1].search)
    assert reports[1].search_loss_after == pytest.approx(tried[reports[1].step_size], rel=1e-4)
    assert reports[1].search_loss_after < reports[1].search_loss_before


def test_tokens_of_weight_zero_are_not_counted(tmp_path):
    """LongCat sends those of its zero experts to real ones like this."""
    model = make_mixtral()
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: (out[0], out[1] * torch.tensor([1, 0]), out[2]))
    initialize(model, SAMPLES, tmp_path, **EIGHT)
    experts = [found for name, found in stored_statistics(tmp_path).items() if "layers.0.mlp.experts[" in name]
    assert sum(found.num_input_tokens for found in experts) == sum(len(s["input_ids"]) for s in chosen(SAMPLES))


def test_a_forward_of_the_experts_own_is_put_back():
    model = make_mixtral()
    experts, *others = (module for module in model.modules() if type(module).__name__ == "MixtralExperts")
    calls, original = [], experts.forward

    def patched(*args):
        calls.append(1)
        return original(*args)

    experts.forward = patched
    initialize(model, SAMPLES, **{**EIGHT, "save_statistics": False})
    assert experts.forward is patched
    assert others
    assert not any("forward" in vars(module) for module in others)
    before = len(calls)
    model(**collate(make_learnable_samples(2)))
    assert len(calls) == before + 1


def test_experts_whose_adapter_has_a_copy_in_an_optimizer_are_refused():
    model = make_mixtral()
    parameter = next(p for name, p in model.named_parameters() if "experts.lora_B" in name)
    parameter._hp_mapping = None  # as DeepSpeed's ZeRO-1 and 2 mark the parameters that they have copies of
    with pytest.raises(UnsupportedSetupError, match=r"mlp\.experts"):
        initialize(model, SAMPLES)


@pytest.mark.support("PEFT", "Experts that no token is routed to", "keep PEFT's own initialisation and are listed")
def test_an_expert_without_tokens_keeps_its_initialisation_and_is_listed(tmp_path):
    model = make_mixtral()
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(send_nothing_to_the_last_expert)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = initialize(model, SAMPLES, tmp_path, **EIGHT)
    assert sum(name.endswith("[3]") for name in report.kept) == 4
    assert_initialized(tmp_path, Adapter.of(model), report, kept=("mlp.gate", "[3]"))
    for name, parameter in model.named_parameters():
        if "experts" in name and "lora_A" in name:
            assert torch.equal(parameter[12:], before[name][12:])  # four rows an expert
            assert not torch.equal(parameter[:12], before[name][:12])
        if "experts" in name and "lora_B" in name:
            assert not parameter[:, 3::4].any()
            assert parameter[:, 0::4].any()


RANKS = {"experts.gate_up_proj": 2, r"layers\.1\..*experts\.down_proj": 3, "q_proj": 5}


@pytest.mark.support(
    "PEFT", "Experts with `rank_pattern`, `alpha_pattern`", "keys are `<module>.<parameter>`, all experts of one alike"
)
# PEFT 0.21 says that keys of parameters match nothing, and uses them all the same, seen 2026-11
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_experts_with_ranks_of_their_own_are_written_and_read(tmp_path):
    model = make_mixtral(rank_pattern=RANKS, alpha_pattern={name: 4 * rank for name, rank in RANKS.items()})
    report = initialize(model, SAMPLES, tmp_path, **EIGHT)
    assert_initialized(tmp_path, Adapter.of(model), report, kept=("mlp.gate",))
    assert {layer.rank for layer in report.layers} == {2, 3, 4, 5}
    loaded = PeftModel.from_pretrained(FAMILIES["Mixtral (experts)"].make_model(), tmp_path)
    with torch.no_grad():
        found, expected = (m.eval()(**collate(SAMPLES[:4])).logits for m in (loaded, model))
    assert torch.equal(found, expected)


def test_a_stored_initialisation_of_experts_is_used_for_some_of_them_and_knows_its_base(tmp_path):
    initialize(make_mixtral(), SAMPLES, tmp_path, **EIGHT)
    report = apply_init(make_mixtral(target_parameters=["experts.down_proj"]), tmp_path)
    assert sum("[" in layer.name for layer in report.layers) == EXPERT_LAYERS // 2


def test_experts_that_cannot_be_run_one_by_one_are_listed():
    model = make_mixtral()
    model.get_base_model().model.layers[0].mlp.experts.get_base_layer()._is_expert_parallel = True
    kept = initialize(model, SAMPLES, step_size=0.05, search_samples=0).kept
    assert "model.layers.0.mlp.experts.base_layer" in kept
    assert "model.layers.1.mlp.experts.base_layer" not in kept
