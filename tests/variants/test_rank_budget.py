"""Ranks per layer under a budget: in a trainer, without one, and of a stored initialisation."""

import pytest
import torch
from families.zoo import EXPERTS, FAMILIES
from harness import (
    Adapter,
    adapter_weights,
    assert_initialized,
    assert_made_from_data,
    assert_same_tensors,
    collate,
    make_args,
    make_config,
    make_lora_config,
    train_from,
    written_adapter,
)
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import Trainer

from lora_da_hf import LoRADACallback, LoRADATrainer, initialize_lora_da, refit_init
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.cli.main import main
from lora_da_hf.errors import ConfigError, TargetError, UnsupportedSetupError
from lora_da_hf.theory.rank_budget import num_adapter_parameters

BUDGET = 5000
CHEAPEST = 48 + 24
"""Parameters of one rank of the narrowest layer."""


def initialize(model, samples, folder=None, **settings):
    settings = {"rank_budget": BUDGET, **settings}
    return initialize_lora_da(
        model,
        samples,
        config=make_config(**settings),
        data_collator=collate,
        output_dir=folder,
        progress=False,
    )


def make_trainer(folder, model, samples, steps=3, arguments=None, budget=BUDGET, **settings):
    return LoRADATrainer(
        model=model,
        args=make_args(folder, max_steps=steps, **(arguments or {})),
        train_dataset=samples,
        data_collator=collate,
        da_config=make_config(rank_budget=budget),
        **settings,
    )


def logits(model, samples):
    with torch.no_grad():
        return model.eval()(**collate(samples[:4])).logits


def ranks_of(model):
    return {name: module.r["default"] for name, module in lora_layers(model).items()}


def scalings_of(model):
    return {name: module.scaling["default"] for name, module in lora_layers(model).items()}


def lora_layers(model):
    layers = model.get_base_model().named_modules()
    return {name: module for name, module in layers if hasattr(module, "lora_A") and "default" in module.r}


def check_budget(model, folder, base):
    """The ranks differ and spend the budget, the scalings are as before, and PEFT's config says so."""
    ranks, entries = ranks_of(model), load_init(folder).manifest.layers
    widths = {name: (layer.in_features, layer.out_features) for name, layer in entries.items()}
    assert BUDGET - CHEAPEST < num_adapter_parameters(ranks, widths) <= BUDGET
    assert len(set(ranks.values())) > 2
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {4.0}
    assert ranks == {name: layer.rank for name, layer in entries.items()}
    loaded = PeftModel.from_pretrained(base, folder)
    assert ranks_of(loaded) == ranks
    assert {layer.scaling["default"] for layer in lora_layers(loaded).values()} == {4.0}
    assert_made_from_data(written_adapter(folder), ranks)


VARIANTS = [
    {},
    {"use_rslora": True, "lora_alpha": 8},
    {"use_dora": True},
    {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 8}},
]


@pytest.mark.support(
    "PEFT",
    "Ranks per layer (`rank_budget`)",
    "in `LoRADATrainer` before it makes its optimizer, or by `initialize_lora_da`; written as `rank_pattern`, each "
    "layer keeps its scaling; not with experts, DeepSpeed or FSDP2",
)
@pytest.mark.parametrize("lora", VARIANTS)
def test_a_trainer_gives_each_layer_its_rank_before_it_makes_the_optimizer(tmp_path, tiny_llama, samples, lora):
    trainer = make_trainer(tmp_path, tiny_llama(), samples, peft_config=make_lora_config(**lora))
    start = train_from(trainer)
    assert_initialized(tmp_path / "lora_da", start, trainer.lora_da_report)
    check_budget(trainer.model, tmp_path / "lora_da", tiny_llama())
    report = trainer.lora_da_report
    assert report.search_loss_after < report.search_loss_before
    assert any(f"of {BUDGET} parameters" in note for note in report.notes)
    logged = [entry["step"] for entry in trainer.state.log_history if "lora_da_step_size" in entry]
    assert logged == [0]
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in trainer.model.parameters() if p.requires_grad}
    assert all(
        not torch.equal(tensor, start.weights[name]) for name, tensor in Adapter.of(trainer.model).weights.items()
    )
    trainer.save_model(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
    assert torch.equal(logits(loaded, samples), logits(trainer.model, samples))


def test_the_ranks_are_those_that_a_stored_initialisation_is_given_offline(tmp_path, tiny_llama, lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, tmp_path / "online")
    check_budget(model, tmp_path / "online", tiny_llama())
    assert {layer.name: layer.rank for layer in report.layers} == ranks_of(model)
    initialize(lora_model(), samples, tmp_path / "uniform", rank_budget=None, max_rank=8)
    refit_init(tmp_path / "uniform", tmp_path / "offline", rank_budget=BUDGET, step_size=report.step_size)
    online, offline = (PeftConfig.from_pretrained(tmp_path / which) for which in ("online", "offline"))
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert getattr(online, name) == getattr(offline, name)
    found, expected = (written_adapter(tmp_path / which) for which in ("online", "offline"))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    again = refit_init(tmp_path / "online", tmp_path / "again", config=make_config(num_samples=256, rank_budget=3000))
    assert sum(layer.rank for layer in again.manifest.layers.values()) < sum(ranks_of(model).values())
    assert again.manifest.config["rank_budget"] == 3000


def test_what_a_run_left_is_used_with_its_ranks(tmp_path, lora_model, samples):
    models = [lora_model(), lora_model()]
    reports = [initialize(model, samples, tmp_path / "init") for model in models]
    assert "made before with the same model" in reports[1].notes[-1]
    assert_same_tensors(*(adapter_weights(model) for model in models))
    assert ranks_of(models[0]) == ranks_of(models[1])
    configs = [model.peft_config["default"] for model in models]
    assert configs[0].rank_pattern == configs[1].rank_pattern != {}


@pytest.mark.parametrize("key", ["embed_tokens", "model.embed_tokens", r".*embed_tok\w+"])
def test_layers_left_to_peft_keep_their_rank_and_count_for_nothing(tmp_path, tiny_llama, samples, key):
    lora = make_lora_config(
        target_modules=["embed_tokens", "q_proj", "v_proj", "up_proj"],
        r=8,
        rank_pattern={key: 3},
        alpha_pattern={key: 32},
    )
    model = get_peft_model(tiny_llama(), lora)
    report = initialize(model, samples, tmp_path, rank_budget=1500)
    assert list(report.kept) == ["model.embed_tokens"]
    assert ranks_of(model)["model.embed_tokens"] == 3
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert ranks_of(loaded) == ranks_of(model)
    assert scalings_of(loaded) == scalings_of(model)
    assert scalings_of(model) == {name: 32 / 3 if "embed" in name else 2 for name in ranks_of(model)}
    assert torch.equal(logits(loaded, samples), logits(model, samples))


# PEFT 0.21 says that keys of parameters match nothing, and uses them all the same, seen 2026-11
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("pattern", [{}, {"mlp.gate.weight": 3}])
def test_a_parameter_that_is_no_expert_keeps_its_rank_too(tmp_path, samples, pattern):
    def make_base():
        return FAMILIES["Mixtral (experts)"].make_model()

    router = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.gate.weight"]}
    model = get_peft_model(make_base(), make_lora_config(**router, rank_pattern=pattern))
    before = ranks_of(model)
    report = initialize(model, samples, tmp_path, rank_budget=900)
    assert list(report.kept) == [f"model.layers.{number}.mlp.gate" for number in range(2)]
    assert len({layer.rank for layer in report.layers}) > 2
    assert all(ranks_of(model)[name] == before[name] for name in report.kept)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert ranks_of(loaded) == ranks_of(model)
    assert scalings_of(loaded) == scalings_of(model)
    assert torch.equal(logits(loaded, samples), logits(model, samples))


ONE_LAYER = r"model\.layers\.0\.self_attn\.q_proj"
"""A regular expression: PEFT reads it, and a stored initialisation may not have it."""


@pytest.mark.parametrize(
    ("lora", "budget", "differ"),
    [
        ({}, BUDGET, True),
        ({"exclude_modules": ["o_proj"]}, BUDGET, True),
        ({"target_modules": r".*\.(q|v|up)_proj", "alpha_pattern": {r".*\.q_proj": 8}}, BUDGET // 2, True),
        ({"target_modules": ONE_LAYER, "r": 8, "rank_pattern": {ONE_LAYER: 4}}, 4 * (48 + 48), False),
    ],
    ids=["plain", "exclude_modules", "regex", "ranks_as_they_were"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, tiny_llama, samples, lora, budget, differ):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainers = [
        make_trainer(
            tmp_path,
            tiny_llama(),
            samples,
            4,
            arguments=saving,
            peft_config=make_lora_config(**lora),
            budget=budget,
        )
        for _ in range(2)
    ]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(*(adapter_weights(trainer.model) for trainer in trainers))
    assert (len(set(ranks_of(trainers[1].model).values())) > 2) == differ
    assert scalings_of(trainers[1].model) == scalings_of(trainers[0].model)
    assert trainers[1].lora_da_report.layers == trainers[0].lora_da_report.layers


def test_a_second_train_keeps_the_ranks(tmp_path, tiny_llama, samples):
    trainer = make_trainer(tmp_path, tiny_llama(), samples, peft_config=make_lora_config())
    trainer.train()
    ranks, report = ranks_of(trainer.model), trainer.lora_da_report
    trainer.train()
    assert ranks_of(trainer.model) == ranks
    assert trainer.lora_da_report is report


def test_the_adapter_is_put_back_if_the_initialisation_fails(lora_model, samples):
    model = lora_model(rank_pattern={"q_proj": 2})
    before, config = adapter_weights(model), model.peft_config["default"].to_dict()
    layers = {
        name: (m.r["default"], m.scaling["default"], m.lora_alpha["default"]) for name, m in lora_layers(model).items()
    }
    parameters = dict(model.named_parameters())

    def fails_late(model, batch, num_items):
        if any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name):
            raise RuntimeError("late")
        return model(**batch, num_items_in_batch=num_items).loss

    with pytest.raises(RuntimeError, match="late"):
        initialize_lora_da(
            model,
            samples,
            config=make_config(rank_budget=BUDGET),
            data_collator=collate,
            compute_loss=fails_late,
            progress=False,
        )
    assert_same_tensors(adapter_weights(model), before)
    assert model.peft_config["default"].to_dict() == config
    assert layers == {
        name: (m.r["default"], m.scaling["default"], m.lora_alpha["default"]) for name, m in lora_layers(model).items()
    }
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_a_budget_is_refused_once_an_optimizer_has_the_parameters(tmp_path, lora_model, tiny_llama, samples):
    callback = LoRADACallback(make_config(rank_budget=BUDGET))
    settings = {"args": make_args(tmp_path), "train_dataset": samples, "data_collator": collate}
    trainer = Trainer(model=lora_model(), callbacks=[callback], **settings)
    with pytest.raises(
        UnsupportedSetupError, match=r"The trainer's optimizer holds the adapter's .* LoRADATrainer does"
    ):
        trainer.train()
    model = lora_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, samples, optimizers=(optimizer, None))
    with pytest.raises(
        UnsupportedSetupError, match=r"The optimizer that was given holds .* `lora-da refit --rank-budget`"
    ):
        trainer.train()
    trainer = make_trainer(tmp_path, tiny_llama(), samples, peft_config=make_lora_config())
    trainer.is_fsdp_enabled = True
    with pytest.raises(UnsupportedSetupError, match="DeepSpeed or FSDP takes the adapter's parameters, and"):
        trainer.create_optimizer()


def test_a_budget_is_refused_where_it_cannot_be_spent(tmp_path, lora_model, samples):
    model = lora_model()
    next(p for name, p in model.named_parameters() if "lora_A" in name)._hp_mapping = None  # as ZeRO-1 and 2 do
    with pytest.raises(UnsupportedSetupError, match="q_proj: DeepSpeed or FSDP2 has the parameters, and"):
        initialize(model, samples)
    experts = get_peft_model(FAMILIES["Mixtral (experts)"].make_model(), make_lora_config(**EXPERTS))
    with pytest.raises(TargetError, match=r"experts.*\[0\]: the experts of a layer share one parameter and one rank"):
        initialize(experts, samples)
    with pytest.raises(ConfigError, match="A rank budget of 100 parameters is too small: rank 1 in each of the 14"):
        initialize(lora_model(), samples, rank_budget=100)


def test_a_budget_is_refused_for_a_stored_initialisation_that_is_used(tmp_path, stored_init, lora_model, samples):
    trainer = make_trainer(tmp_path, lora_model(), samples, init_from=stored_init)
    with pytest.raises(
        ConfigError, match=r"rank_budget=5000 is spent when .* with refit_init or `lora-da refit --rank"
    ):
        trainer.train()


@pytest.mark.support(
    "PEFT",
    "Ranks per layer of a stored initialisation (`lora-da refit --rank-budget`, `refit_init`)",
    "offline, from the stored spectra; written as `rank_pattern`, each layer keeps its scaling",
)
@pytest.mark.parametrize("flag", ["--rank-budget", "--rank_budget", "--da-rank-budget", "--da_rank_budget"])
def test_the_ranks_of_a_stored_initialisation_are_shared_out(tmp_path, tiny_llama, lora_model, samples, flag):
    initialize(lora_model(), samples, tmp_path / "stored", rank_budget=None, max_rank=8)
    assert main(["refit", str(tmp_path / "stored"), str(tmp_path / "new"), flag, str(BUDGET), "--quiet"]) == 0
    report = load_init(tmp_path / "new")
    start = PeftModel.from_pretrained(tiny_llama(), tmp_path / "new")
    check_budget(start, tmp_path / "new", tiny_llama())
    assert report.manifest.config["rank_budget"] == BUDGET
