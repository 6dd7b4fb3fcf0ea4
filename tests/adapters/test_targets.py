import pytest
from harness import LINEAR_LAYERS, make_lora_config

from lora_da_hf.adapters.targets import active_adapter_name, base_name, find_targets, keep_weights_unpacked
from lora_da_hf.adapters.write import freeze_a
from lora_da_hf.errors import TargetError


def test_every_layer_is_found_in_the_models_order_with_its_sizes(lora_model):
    scan = find_targets(lora_model(rank_pattern={"down_proj": 6}, alpha_pattern={"v_proj": 2}))
    assert (len(scan.targets), scan.kept, scan.adapter_name) == (LINEAR_LAYERS, {}, "default")
    assert [target.name.rsplit(".", 1)[-1] for target in scan.targets[:7]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    for target in scan.targets:
        assert target.base_layer.weight.shape == (target.out_features, target.in_features)
        assert target.lora_A.shape == (target.rank, target.in_features)
        assert target.lora_B.shape == (target.out_features, target.rank)
        assert target.rank == (6 if "down_proj" in target.name else 4)
        alpha = 2 if "v_proj" in target.name else 16
        assert target.peft_scaling == alpha / target.rank


def test_names_are_those_of_the_base_model(lora_model, tiny_llama):
    model, base = lora_model(), dict(tiny_llama().named_modules())
    assert all(target.name in base for target in find_targets(model).targets)
    inner = [target.name for target in find_targets(model.get_base_model()).targets]
    assert inner == [target.name for target in find_targets(model).targets]
    assert base_name("base_model.model.model.norm") == "model.norm"
    assert base_name("model.norm") == "model.norm"


def test_the_adapter_that_is_named_is_looked_at(lora_model):
    model = lora_model()
    model.add_adapter("second", make_lora_config(r=2, target_modules=["q_proj"]))
    assert active_adapter_name(model) == "default"
    with pytest.raises(TargetError, match="'second' is not the active one, 'default' is"):
        find_targets(model, "second")
    model.set_adapter("second")
    assert [target.rank for target in find_targets(model, "second").targets] == [2, 2]
    assert active_adapter_name(model) == "second"
    assert len(find_targets(model).targets) == 2


def test_freezing_a_of_one_adapter_leaves_the_others_alone_and_is_done_once(lora_model):
    model = lora_model()
    model.add_adapter("second", make_lora_config())
    model.base_model.set_adapter(["default", "second"])
    named = dict(model.named_parameters())
    frozen = freeze_a(model, "second")
    assert {id(p) for p in frozen} == {id(p) for name, p in named.items() if "lora_A.second" in name}
    assert all(p.requires_grad == ("lora_" in name and "lora_A.second" not in name) for name, p in named.items())
    assert freeze_a(model, "second") == []


def test_only_layers_that_pack_their_weights_are_put_in_train_mode(lora_model):
    model = lora_model().eval()
    layer = find_targets(model).targets[3].base_layer
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes marks its 4-bit layers
    keep_weights_unpacked(model)
    assert [module for module in model.modules() if module.training] == [layer]
