"""What cannot be initialised is refused with the reason, and everything stays as it was; what can be kept is listed."""

import pytest
import torch
from families.zoo import FAMILIES
from harness import (
    adapter_weights,
    assert_same_tensors,
    factors,
    initialize,
    make_learnable_samples,
    make_lora_config,
    model_loss,
)
from peft import IA3Config, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from torch import nn
from torch.utils.data import IterableDataset

from lora_da_hf import LoRADAError
from lora_da_hf.errors import (
    AdapterAlreadyTrainedError,
    ConfigError,
    DataError,
    NonFiniteError,
    SolveError,
    TargetError,
    UnsupportedSetupError,
)

VELORA = VeloraConfig(num_groups=4)


def refuses(kind, match, model, samples, folder=None, **settings):
    """Check the error, and that it leaves everything as it was."""

    def state():
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return hooks, flags, [module.training for module in model.modules()]

    before, weights = state(), adapter_weights(model)
    with pytest.raises(kind, match=match) as caught:
        initialize(model, samples, folder, **settings)
    assert isinstance(caught.value, LoRADAError)
    if not any(tensor.is_meta for tensor in weights.values()):
        assert_same_tensors(adapter_weights(model), weights)
    assert state() == before


# The model


def trained(tiny_llama, lora_model):
    model = lora_model()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[3, 1] = 1e-8
    return model


def merged(tiny_llama, lora_model):
    model = lora_model()
    model.merge_adapter()
    return model


def disabled(tiny_llama, lora_model):
    model = lora_model()
    model.base_model.disable_adapter_layers()
    return model


def two_active(tiny_llama, lora_model):
    model = lora_model()
    model.add_adapter("second", make_lora_config())
    model.base_model.set_adapter(["default", "second"])
    return model


def adapter_on_meta(tiny_llama, lora_model):
    model = lora_model()
    model.delete_adapter("default")
    model.add_adapter("default", make_lora_config(), low_cpu_mem_usage=True)
    model.set_adapter("default")
    return model


def with_a_nan(tiny_llama, lora_model):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return lora_model(model=model)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda llama, _: llama(), TargetError, "get_peft_model"),
        (trained, AdapterAlreadyTrainedError, r"lora_B.*model.layers.1.mlp.up_proj"),
        (merged, TargetError, "unmerge_adapter"),
        (disabled, TargetError, "enable_adapter_layers"),
        (two_active, TargetError, r"'default', 'second'"),
        (
            lambda t, _: get_peft_model(t(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
            TargetError,
            "IA3",
        ),
        (lambda llama, lora: lora(model=llama().to("meta")), TargetError, "meta"),
        (adapter_on_meta, TargetError, "low_cpu_mem_usage"),
        (lambda _, lora: lora(velora_config=VELORA), TargetError, r"q_proj.*VeloraLinearVariant"),
        (lambda _, lora: lora(r=49, target_modules=["q_proj"]), TargetError, "rank 49.*48"),
        (with_a_nan, NonFiniteError, "nan"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_model_that_cannot_be_initialised(tiny_llama, lora_model, samples, make, kind, match):
    refuses(kind, match, make(tiny_llama, lora_model), samples)


def test_an_adapter_that_was_initialised_before(lora_model, samples):
    model = lora_model()
    initialize(model, samples)
    refuses(AdapterAlreadyTrainedError, "fresh", model, samples)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off(lora_model, samples, off):
    model = lora_model()
    with off():
        refuses(ConfigError, off.__name__, model, samples)


def test_an_adapter_that_could_not_be_stored_is_refused_with_a_folder_alone(tiny_llama, lora_model, samples, tmp_path):
    replicated = lora_model(layer_replication=[(0, 2), (0, 2)], target_modules=["q_proj", "v_proj"])
    refuses(UnsupportedSetupError, "layer_replication", replicated, samples, tmp_path / "init")
    assert initialize(replicated, samples).step_size > 0
    mixed = get_peft_model(tiny_llama(), make_lora_config(), mixed=True)
    refuses(TargetError, "mixed=True", mixed, samples, tmp_path / "init")
    assert not list(tmp_path.iterdir())


class Wrapped(nn.Module):
    """A PEFT model inside of another module, as a model with a value head is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, **batch):
        return self.inner(**batch)


def test_a_wrapped_model_is_initialised_without_a_folder(lora_model, samples, tmp_path):
    wrapped = Wrapped(lora_model())
    refuses(TargetError, "Wrapped.*output_dir", wrapped, samples, tmp_path / "init")
    assert len(initialize(wrapped, samples).layers) == len(initialize(lora_model(), samples).layers)


# Layers that keep PEFT's own initialisation


def test_a_variant_that_is_not_known_in_some_layers_keeps_them_and_reports_them(lora_model, samples):
    model = lora_model(velora_config=VELORA)
    for name, module in model.named_modules():
        if hasattr(module, "lora_variant") and "layers.1" in name:
            module.lora_variant.clear()
    before = adapter_weights(model)
    report = initialize(model, samples)
    assert len(report.layers) == len(report.kept) == 7
    assert all(name.startswith("model.layers.0.") for name in report.kept)
    assert all("VeloraLinearVariant" in reason for reason in report.kept.values())
    assert "7 layers keep PEFT's own initialisation" in str(report)
    after = adapter_weights(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        n for n in before if "layers.1" in n
    }


def test_embeddings_and_a_head_that_shares_their_adapter_are_kept_and_said(tiny_llama, lora_model, samples, caplog):
    initialize(lora_model(), samples)
    assert "PEFT's own" not in caplog.text
    model = lora_model(
        model=tiny_llama(tie_word_embeddings=True),
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )
    before = {name: tensor for name, tensor in adapter_weights(model).items() if "q_proj" not in name}
    report = initialize(model, samples)
    assert set(report.kept) == {"model.embed_tokens", "lm_head"}
    assert "Embedding" in report.kept["model.embed_tokens"]
    assert "ensure_weight_tying" in report.kept["lm_head"]
    assert "embed_tokens keeps PEFT's own" in caplog.text
    assert report.search_loss_after < report.search_loss_before
    assert_same_tensors({name: adapter_weights(model)[name] for name in before}, before)


def with_unused_layer(model):
    model.model.layers[0].unused_proj = nn.Linear(48, 48)
    return model


@pytest.mark.parametrize("memory_budget", [None, 300_000])
def test_a_layer_that_is_never_called_is_kept_and_listed(tiny_llama, lora_model, samples, memory_budget):
    model = lora_model(model=with_unused_layer(tiny_llama()))
    report = initialize(model, samples, memory_budget=memory_budget)
    assert set(report.kept) == {"model.layers.0.unused_proj"}
    assert len(report.layers) == 14


def test_no_layer_that_is_called_is_an_error(tiny_llama, lora_model, samples):
    model = lora_model(model=with_unused_layer(tiny_llama()), target_modules=["unused_proj"])
    refuses(SolveError, "model.layers.0.unused_proj", model, samples)


# The loss


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda loss: loss.detach(), SolveError, "cut off"),
        (lambda loss: loss.detach().requires_grad_(), SolveError, "cut off"),
        (lambda loss: loss.detach() + 0 * loss, SolveError, "gradient is zero"),
        (lambda loss: loss * float("nan"), NonFiniteError, "nan"),
        (lambda loss: loss * (float("nan") if torch.is_grad_enabled() else 1), NonFiniteError, "nan"),
        (lambda loss: loss * float("inf"), NonFiniteError, "inf"),
        (lambda loss: 1.0, DataError, "float"),
        (lambda loss: (loss, None), DataError, "tuple"),
        (lambda loss: loss.expand(3), DataError, r"\[3\]"),
    ],
    ids=["detached", "a leaf", "flat", "nan", "nan in the pass", "inf", "float", "tuple", "vector"],
)
def test_a_loss_that_cannot_be_used(lora_model, samples, change, kind, match):
    def loss(*inputs):
        return change(model_loss(*inputs))

    refuses(kind, match, lora_model(), samples, loss=loss)


@pytest.mark.parametrize("first", [12, 15])
def test_a_loss_that_is_not_finite_on_samples_of_the_search_or_unseen(lora_model, samples, first):
    rows = [
        {**s, "input_ids": [95, *s["input_ids"][1:]]} if first <= i < first + 3 else s for i, s in enumerate(samples)
    ]

    def loss(model, batch, num_items):
        return model_loss(model, batch, num_items) * (float("nan") if (batch["input_ids"] == 95).any() else 1)

    kind = "search" if first == 12 else "unseen"
    refuses(NonFiniteError, kind, lora_model(), iter(rows), loss=loss, population_size=24)


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_a_loss_in_a_dict_a_list_or_a_tuple_is_found_as_trainer_finds_it(lora_model, samples, kind):
    model, plain = lora_model(), lora_model()
    forward = model.forward

    def returns(**inputs):
        outputs = forward(**inputs)
        return {"loss": outputs.loss} if kind is dict else kind([outputs.loss])

    model.forward = returns
    found, expected = (initialize(one, samples, loss_reduction="token_mean") for one in (model, plain))
    assert found.step_size == pytest.approx(expected.step_size, rel=1e-3)


# The samples


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


def unlabelled(sample):
    return {**sample, "labels": [-100] * len(sample["input_ids"])}


def only_the_first_label(sample):
    return {**sample, "labels": [sample["input_ids"][0], *[-100] * (len(sample["input_ids"]) - 1)]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: [], r"[Nn]o sample"),
        (lambda rows: Empty(), r"[Nn]o sample"),
        (lambda rows: rows[:1], "line search"),
        (lambda rows: [row if not n else unlabelled(row) for n, row in enumerate(rows)], "label"),
        (lambda rows: 3, "int"),
        (lambda rows: {"input_ids": [[1, 2]]}, "mapping"),
        (lambda rows: ["some text"] * 20, "str"),
        (lambda rows: [{**row, "text": "words"} for row in rows], "'text'"),
        (lambda rows: [{k: row[k] for k in list(row)[n % 2 :]} for n, row in enumerate(rows)], "keys"),
        (lambda rows: [unlabelled(row) for row in rows], "label"),
        (lambda rows: [only_the_first_label(row) for row in rows], "label"),
        (lambda rows: [{"input_ids": row["input_ids"]} for row in rows], "labels"),
    ],
    ids=[
        *("none", "empty stream", "one", "one labelled", "number", "mapping", "texts", "text column", "other keys"),
        *("no label", "first label", "no labels"),
    ],
)
def test_samples_that_cannot_be_used(lora_model, samples, change, match):
    refuses(DataError, match, lora_model(), change(samples), collator=None, population_size=24)


def test_a_stream_of_unknown_size_and_a_collator_that_makes_something_else(lora_model, samples):
    refuses(DataError, "population_size", lora_model(), iter(samples))
    refuses(DataError, "collator.*list", lora_model(), samples, collator=list)


def test_no_label_in_the_samples_of_the_line_search(lora_model, samples):
    rows = [unlabelled(s) if number >= 12 else s for number, s in enumerate(samples)]
    refuses(DataError, "line search has a label", lora_model(), iter(rows), population_size=24)


def test_samples_without_a_label_are_counted_and_change_nothing_else(lora_model, samples):
    rows = [*samples[:10], unlabelled(samples[10]), unlabelled(samples[11])]
    some, fewer = lora_model(), lora_model()
    report = initialize(some, iter(rows), step_size=0.1, population_size=10)
    assert (report.num_samples, report.num_unlabelled) == (10, 2)
    initialize(fewer, iter(samples[:10]), step_size=0.1, population_size=10)
    weights, expected = adapter_weights(some), adapter_weights(fewer)
    for name, b in factors(expected, "B").items():
        a = name.replace("lora_B", "lora_A")
        torch.testing.assert_close(weights[name] @ weights[a], b @ expected[a], rtol=1e-4, atol=1e-6)


def of_length(count, number=24):
    return [{"input_ids": [5] * count, "attention_mask": [1] * count, "labels": [5] * count}] * number


def test_a_sample_that_is_too_long_for_a_table_of_positions(lora_model, tiny_llama):
    model = FAMILIES["GPT-2 (Conv1D)"].adapt()
    refuses(DataError, "65 tokens.*64", model, of_length(65))
    assert initialize(model, of_length(64), step_size=0.1).num_samples == 12
    rotary = lora_model(model=tiny_llama(max_position_embeddings=8))
    assert initialize(rotary, make_learnable_samples(24), step_size=0.1).num_samples == 12


# Settings, and where it is written


@pytest.mark.parametrize(
    "settings", [{"batch_size": -3}, {"population_size": -5}, {"seed": -1}, {"seed": 2**32}, {"save_statistics": True}]
)
def test_settings_that_cannot_be(lora_model, samples, settings):
    (name,) = settings
    refuses(ConfigError, name, lora_model(), samples, **settings)


def test_a_max_rank_below_the_adapters_rank(lora_model, samples, tmp_path):
    refuses(ConfigError, "max_rank=2.*4", lora_model(), samples, tmp_path / "init", max_rank=2)
    assert not list(tmp_path.iterdir())


def test_nothing_but_an_initialisation_is_ever_replaced(lora_model, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-500" / "model.bin").write_text("weeks of work")
    (tmp_path / "script.py").write_text("pass")
    lora_model().save_pretrained(tmp_path / "adapter")
    for place in ("run", "script.py", "adapter", "script.py/init"):
        refuses(ConfigError, place, lora_model(), samples, tmp_path / place)
    refuses(ConfigError, r"'\.'", lora_model(), samples, ".")
    assert (tmp_path / "run" / "checkpoint-500" / "model.bin").read_text() == "weeks of work"
