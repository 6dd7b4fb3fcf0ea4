from harness import make_lora_config

from lora_da_hf.adapters.targets import find_targets, keep_weights_unpacked
from lora_da_hf.adapters.write import freeze_a


def test_freezing_a_of_one_adapter_leaves_the_others_alone_and_is_done_once(lora_model):
    model = lora_model()
    model.add_adapter("second", make_lora_config())
    model.set_adapter("second")
    freeze_a(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    freeze_a(model)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(p.requires_grad == ("lora_B.second" in name) for name, p in model.named_parameters())


def test_only_layers_that_pack_their_weights_are_put_in_train_mode(lora_model):
    model = lora_model().eval()
    layer = find_targets(model).targets[3].base_layer
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes marks its 4-bit layers
    keep_weights_unpacked(model)
    assert [module for module in model.modules() if module.training] == [layer]
