"""PEFT's variants of LoRA: each starts from the data, trains, and is what a stored adapter gives."""

import pytest
import torch
from families.zoo import FAMILIES
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_initialized,
    base_linear_layers,
    collate,
    initialize,
    make_config,
    make_learnable_samples,
    make_lora_config,
    make_trainer,
    train_from,
)
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.nn.functional import linear

from lora_da_hf.errors import UnsupportedSetupError
from lora_da_hf.samples import pad_samples


def row(what, remark, *values):
    return pytest.param(*values, id=what, marks=pytest.mark.support("PEFT", what, remark))


def logits(model, samples):
    with torch.no_grad():
        return model.eval()(**collate(samples[:4])).logits


def train(folder, model, samples=None, **settings):
    """Return the trainer, and the adapter that it started from."""
    trainer = make_trainer(folder, model, samples, arguments={"max_steps": 3}, **settings)
    return trainer, train_from(trainer)


PART = {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["o_proj"]}
VARIANTS = [
    row("rsLoRA", "PEFT's scaling is read from the layer", {"use_rslora": True}),
    row(
        "DoRA",
        "the magnitude is set to the norms of what is written: step 0 is W + s B A; not under ZeRO-3",
        {"use_dora": True},
    ),
    row("`lora_bias`", "the bias starts at zero, as PEFT has it", {"lora_bias": True}),
    row(
        "`rank_pattern`, `alpha_pattern`",
        "stored if all layers have one scaling, as this adapter's",
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 8}},
    ),
    row("`lora_dropout`", "off during the initialisation", {"lora_dropout": 0.1}),
    row("`modules_to_save`", "trained in full as ever", {"modules_to_save": ["lm_head"]}),
    row("`layers_to_transform`, `exclude_modules`", "", PART),
]


# PEFT 0.21 says of lora_bias on layers without a bias that they cannot be merged, and takes it for a partitioned weight
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'. 14 LoRA tensor")
@pytest.mark.parametrize("lora", VARIANTS)
def test_a_variant_is_initialised_trained_and_loaded(tmp_path, tiny_llama, lora_model, lora):
    samples = make_learnable_samples(24)
    trainer, found = train(tmp_path, lora_model(**lora), samples)
    assert_initialized(tmp_path / "lora_da", found, trainer.lora_da_report)
    start = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora_da")
    for layer in trainer.lora_da_report.layers:
        written = start.get_base_model().get_submodule(layer.name)
        assert (layer.rank, layer.peft_scaling) == (written.r["default"], written.scaling["default"])
    expected = with_products(tiny_llama(), start)
    torch.testing.assert_close(logits(start, samples), logits(expected, samples), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(start, samples), logits(tiny_llama(), samples), rtol=1e-2, atol=1e-2)
    trainer.save_model(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
    assert torch.equal(logits(loaded, samples), logits(trainer.model, samples))


def with_products(base, adapted):
    """Add ``scaling * B A`` of every adapter to the weights of a base model."""
    modules = dict(base.named_modules())
    with torch.no_grad():
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                product = module.lora_B["default"].weight @ module.lora_A["default"].weight
                modules[name].weight += module.scaling["default"] * product
    return base


def test_the_magnitude_of_a_layer_that_stores_its_weight_transposed(tmp_path):
    model = FAMILIES["GPT-2 (Conv1D)"].adapt(use_dora=True)
    assert initialize(model, make_learnable_samples(16)).step_size > 0
    layer = model.get_base_model().transformer.h[0].mlp.c_fc
    x = torch.randn(5, 32)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + linear(x, product), rtol=1e-4, atol=1e-4)


def test_dora_is_refused_where_a_process_has_a_part_of_the_base_weight(lora_model):
    model = lora_model(use_dora=True)
    weight = next(iter(base_linear_layers(model).values())).weight
    weight.ds_id, weight.ds_shape = 0, torch.Size([1])  # as ZeRO-3 does
    with pytest.raises(UnsupportedSetupError, match=r"q_proj.*DoRA"):
        initialize(model, make_learnable_samples(16))


def frozen_by_our_setting(model):
    return {"da_config": make_config(freeze_a=True)}


def frozen_by_pefts_optimizer(model):
    return {"optimizers": (create_lorafa_optimizer(model, r=4, lora_alpha=16, lr=1e-2), None)}


@pytest.mark.parametrize(
    "frozen_by",
    [
        row("LoRA-FA (`freeze_a=True`)", "A is frozen after it is written, B alone is trained", frozen_by_our_setting),
        row(
            "LoRA-FA (`create_lorafa_optimizer`)",
            "A is frozen by PEFT, and written all the same",
            frozen_by_pefts_optimizer,
        ),
    ],
)
def test_lora_fa(tmp_path, lora_model, frozen_by):
    model = lora_model()
    trainer, start = train(tmp_path, model, **frozen_by(model))
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)
    for name, tensor in adapter_weights(trainer.model).items():
        assert torch.equal(tensor, start.weights[name]) == ("lora_A" in name), name


@pytest.mark.support("PEFT", "LoRA+ (`create_loraplus_optimizer`)", "")
def test_lora_plus(tmp_path, lora_model):
    model = lora_model()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    trainer, start = train(tmp_path, model, optimizers=(optimizer, None))
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)
    moved = {
        which: max((t - start.weights[n]).abs().max() for n, t in adapter_weights(trainer.model).items() if which in n)
        for which in ("lora_A", "lora_B")
    }
    assert moved["lora_B"] > 4 * moved["lora_A"] > 0


@pytest.mark.support("PEFT", "Tied embeddings", "the output head stays out of `all-linear`")
def test_tied_embeddings(tmp_path, tiny_llama, lora_model):
    trainer, start = train(tmp_path, lora_model(model=tiny_llama(tie_word_embeddings=True)))
    assert len(trainer.lora_da_report.layers) == LINEAR_LAYERS
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)


@pytest.mark.support("PEFT", "The output head as a target", "tied to the embeddings or not")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_as_a_target(tmp_path, tiny_llama, lora_model, tied):
    model = lora_model(model=tiny_llama(tie_word_embeddings=tied), target_modules=["lm_head", "v_proj"])
    trainer, start = train(tmp_path, model)
    assert "lm_head" in {layer.name for layer in trainer.lora_da_report.layers}
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)


LISTED = {
    "Embeddings": ("Llama", ["embed_tokens", "v_proj"], "model.embed_tokens", "Embedding is not a linear layer"),
    "Convolutions": (
        "ViT (images)",
        ["projection", "v_proj"],
        "vit.embeddings.patch_embeddings.projection",
        "Conv2d is not a linear layer",
    ),
}


@pytest.mark.parametrize(
    ("family", "target_modules", "name", "reason"),
    [row(what, "keep PEFT's own initialisation and are listed", *values) for what, values in LISTED.items()],
)
def test_what_is_no_linear_layer_is_listed(tmp_path, family, target_modules, name, reason):
    model = FAMILIES[family].adapt(target_modules=target_modules)
    trainer, start = train(tmp_path, model, FAMILIES[family].samples(24), data_collator=pad_samples)
    assert trainer.lora_da_report.kept == {name: reason}
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report, kept=[name])


@pytest.mark.support("PEFT", "Two adapters on one model", "the active one is initialised, the other stays")
def test_two_adapters_on_one_model(tmp_path, lora_model):
    model = lora_model()
    train(tmp_path / "first", model)
    first = {name: t for name, t in model.named_parameters() if ".default." in name}
    before = {name: tensor.detach().clone() for name, tensor in first.items()}
    model.add_adapter("second", make_lora_config(r=2))
    model.set_adapter("second")
    trainer, start = train(tmp_path / "second", model)
    assert {layer.rank for layer in trainer.lora_da_report.layers} == {2}
    assert_initialized(tmp_path / "second" / "lora_da", start, trainer.lora_da_report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.items())
