"""Layers that cannot be initialised, or not as others are: the rest goes on, and the reason is true."""

import pytest
import torch
import transformers as tf
from harness import make_config, make_learnable_samples, make_lora_config
from peft import PeftModel, get_peft_model

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import TargetError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
}


def deepseek():
    config = tf.DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 4}, **LATENT, moe_intermediate_size=24, n_group=2, topk_group=1
    )
    config.num_experts_per_tok = 2
    return tf.DeepseekV3ForCausalLM(config)


def llama4():
    return tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**DECODER, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    )


def phimoe():
    return tf.PhimoeForCausalLM(tf.PhimoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


def wrapped(make, **lora):
    torch.manual_seed(0)
    return get_peft_model(make(), make_lora_config(**lora))


def initialize(model, samples=None, folder=None, batch_size=4, **arguments):
    config = make_config(num_samples=12, step_size=0.1, search_samples=0, batch_size=batch_size)
    samples = samples or make_learnable_samples(24)
    return initialize_lora_da(model, samples, config=config, output_dir=folder, progress=False, **arguments)


def test_latent_attention_whose_rows_have_a_dimension_of_heads_runs_in_batches():
    names = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    found = []
    for size in (1, 4):
        model = wrapped(deepseek, target_modules=names)
        report = initialize(model, batch_size=size)
        assert (report.batch_size, len(report.layers)) == (size, 8)
        found.append({name: value.detach() for name, value in model.named_parameters() if "lora_" in name})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_parameter_that_is_named_without_its_module_makes_a_folder_that_can_be_read(tmp_path):
    lora = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    report = initialize(wrapped(llama4, **lora), folder=tmp_path / "init")
    assert len(report.layers) == 2
    assert all("experts interface" in reason for reason in report.kept.values())
    assert load_init(tmp_path / "init").report.kept == report.kept
    PeftModel.from_pretrained(llama4(), tmp_path / "init")


@pytest.mark.parametrize("make", [llama4, phimoe])
def test_a_router_that_returns_a_tuple_is_not_taken_for_a_quantised_layer(make):
    with pytest.raises(TargetError, match=r"router: .* returns a tuple.* Exclude it from target_modules"):
        initialize(wrapped(make, target_modules="all-linear"))


def test_a_weight_that_the_model_uses_without_calling_its_layer_is_kept_with_that_reason():
    def wavlm():
        return tf.WavLMForSequenceClassification(
            tf.WavLMConfig(
                **SIZES, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(5, 4), num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4, num_labels=2, classifier_proj_size=16, apply_spec_augment=False,
            )
        )  # fmt: skip

    speech = torch.randn(24, 400, generator=torch.Generator().manual_seed(0))
    samples = [{"input_values": row, "labels": number % 2} for number, row in enumerate(speech)]
    report = initialize(wrapped(wavlm, target_modules=["q_proj", "out_proj", "output_dense"]), samples)
    reasons = {reason for name, reason in report.kept.items() if name.endswith("q_proj")}
    assert reasons == {"it is never called: no sample goes through it, or the model uses its weight in other code"}
    assert any(layer.name.endswith("output_dense") for layer in report.layers)


def test_a_weight_that_goes_into_a_kernel_in_training_is_kept():
    def granite():
        mixer = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
        layers = {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48}
        return tf.GraniteMoeHybridForCausalLM(tf.GraniteMoeHybridConfig(**DECODER, **mixer, **layers))

    report = initialize(wrapped(granite, target_modules=["in_proj", "out_proj", "o_proj"]))
    assert list(report.kept) == ["model.layers.0.mamba.out_proj"]
    assert {layer.name[15:] for layer in report.layers} == {"mamba.in_proj", "self_attn.o_proj"}


def test_weights_that_a_model_divides_in_evaluation_mode_stay_as_they_are():
    def rwkv():
        return tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, rescale_every=1))

    model = wrapped(rwkv, target_modules=["output", "value"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    initialize(model, [{"input_ids": s["input_ids"], "labels": s["labels"]} for s in make_learnable_samples(24)])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("scale", [1e-20, 1e-33])
def test_a_layer_whose_gradient_underflows_keeps_its_start_and_the_rest_goes_on(lora_model, scale):
    model = lora_model()
    sick_layers = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    name = sick_layers[-1]
    sick = model.base_model.model.get_submodule(name)
    sick.register_forward_hook(lambda _, args, output: output.detach() + (output - output.detach()) * scale)
    before = {which: value.detach().clone() for which, value in sick.named_parameters() if "lora_" in which}
    report = initialize(model)
    assert report.kept == dict.fromkeys(sick_layers, "its gradient is too small to be squared in float32")
    assert len(report.layers) == 11
    assert all(torch.equal(value, before[which]) for which, value in sick.named_parameters() if "lora_" in which)
