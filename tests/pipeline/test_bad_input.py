import pytest
import torch
from harness import adapter_weights, assert_same_tensors, collate, make_config, make_learnable_samples, make_lora_config
from peft import IA3Config, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from torch import nn
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel

from lora_da_hf import LoRADAError, initialize_lora_da
from lora_da_hf.adapters.targets import base_name
from lora_da_hf.errors import (
    AdapterAlreadyTrainedError,
    ConfigError,
    DataError,
    NonFiniteError,
    SolveError,
    TapNotCalledError,
    TargetError,
    UnsupportedSetupError,
)
from lora_da_hf.pipeline import run

VELORA = VeloraConfig(num_groups=4)


@pytest.fixture
def samples():
    return make_learnable_samples(24)


def initialize(model, samples, **settings):
    config = settings.pop("config", None) or make_config()
    return initialize_lora_da(model, samples, config=config, progress=False, **settings)


def refuses(kind, match, model, samples, **settings):
    """Check the error, and that it leaves everything as it was."""
    before = adapter_weights(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    modes = [module.training for module in model.modules()]
    with pytest.raises(kind, match=match) as caught:
        initialize(model, samples, **settings)
    assert isinstance(caught.value, LoRADAError)
    if not any(tensor.is_meta for tensor in before.values()):
        assert_same_tensors(adapter_weights(model), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert [module.training for module in model.modules()] == modes


# The model


def test_a_model_without_lora_layers(tiny_llama, samples):
    refuses(TargetError, r"The model has no LoRA layer. Wrap it with peft.get_peft_model", tiny_llama(), samples)


def test_an_adapter_of_a_name_that_is_not_there(lora_model, samples):
    refuses(TargetError, "no LoRA layer of an adapter named 'other'", lora_model(), samples, adapter_name="other")


def test_an_adapter_that_was_trained(lora_model, samples):
    model = lora_model()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[3, 1] = 1e-8
    refuses(
        AdapterAlreadyTrainedError,
        r"lora_B is not zero in 1 layers \(model.layers.1.mlp.up_proj first\): the adapter was trained already",
        model,
        samples,
    )


def test_an_adapter_that_was_initialised_before(lora_model, samples):
    model = lora_model()
    initialize(model, samples)
    refuses(AdapterAlreadyTrainedError, "Initialise a fresh adapter", model, samples)


def test_a_merged_adapter(lora_model, samples):
    model = lora_model()
    model.merge_adapter()
    refuses(TargetError, r"its adapter is merged into the base weight. Call unmerge_adapter\(\) first", model, samples)


def test_a_disabled_adapter(lora_model, samples):
    model = lora_model()
    with model.disable_adapter():
        refuses(TargetError, r"its adapter is disabled.*Call enable_adapter_layers\(\) first", model, samples)
    assert initialize(model, samples).step_size > 0


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off(lora_model, samples, off):
    model = lora_model()
    with off():
        refuses(ConfigError, r"Gradients are off.* Call this outside of torch.no_grad\(\)", model, samples)


def test_an_adapter_that_could_not_be_loaded_again(lora_model, samples, tmp_path):
    model = lora_model(layer_replication=[(0, 2), (0, 2)], target_modules=["q_proj", "v_proj"])
    match = "layer_replication.* could not be loaded again"
    refuses(UnsupportedSetupError, match, model, samples, output_dir=tmp_path / "init")
    assert not list(tmp_path.iterdir())
    assert initialize(model, samples).step_size > 0


def test_two_active_adapters(lora_model, samples):
    model = lora_model()
    model.add_adapter("second", make_lora_config())
    model.base_model.set_adapter(["default", "second"])
    refuses(TargetError, r"Active adapters are \['default', 'second'\], and exactly one can be", model, samples)


def test_an_adapter_of_another_kind(tiny_llama, samples):
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    refuses(TargetError, "The model's adapter was made with IA3Config, and LoRA-DA initialises LoRA", model, samples)


def test_a_mixed_adapter_cannot_be_stored(tiny_llama, samples, tmp_path):
    model = get_peft_model(tiny_llama(), make_lora_config(), mixed=True)
    refuses(TargetError, "made with mixed=True cannot be stored", model, samples, output_dir=tmp_path / "init")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_a_loss_in_a_dict_a_list_or_a_tuple_is_found_as_trainer_finds_it(lora_model, samples, kind):
    model, plain = lora_model(), lora_model()
    forward = model.forward

    def returns(**inputs):
        outputs = forward(**inputs)
        return {"loss": outputs.loss} if kind is dict else kind([outputs.loss])

    model.forward = returns
    found, expected = (
        initialize(one, samples, config=make_config(loss_reduction="token_mean")) for one in (model, plain)
    )
    assert found.step_size == pytest.approx(expected.step_size, rel=1e-3)


def test_a_model_on_the_meta_device(tiny_llama, lora_model, samples):
    model = tiny_llama().to("meta")
    refuses(TargetError, r"on the meta device, so it has no values. Load the model's", lora_model(model=model), samples)


def test_an_adapter_on_the_meta_device(lora_model, samples):
    model = lora_model()
    model.add_adapter("empty", make_lora_config(), low_cpu_mem_usage=True)
    model.set_adapter("empty")
    refuses(
        TargetError,
        "lora_A is on the meta device, .* make the adapter without low_cpu_mem_usage=True",
        model,
        samples,
        adapter_name="empty",
    )


def test_a_variant_that_is_not_known_in_all_layers(lora_model, samples):
    refuses(
        TargetError,
        "None of the 14 LoRA layers can be initialised. .*q_proj: its LoRA variant VeloraLinearVariant is not",
        lora_model(velora_config=VELORA),
        samples,
    )


def test_a_variant_that_is_not_known_in_some_layers_keeps_them_and_reports_them(lora_model, samples):
    model = lora_model(velora_config=VELORA)
    for name, module in model.named_modules():
        if hasattr(module, "lora_variant") and "layers.1" in name:
            module.lora_variant.clear()
    before = adapter_weights(model)
    report = initialize(model, samples)
    assert len(report.layers) == 7
    assert len(report.kept) == 7
    assert all(name.startswith("model.layers.0.") for name in report.kept)
    assert set(report.kept.values()) == {"its LoRA variant VeloraLinearVariant is not initialised from data"}
    assert "7 layers keep PEFT's own initialisation" in str(report)
    after = adapter_weights(model)
    changed = {base_name(name) for name in before if not torch.equal(before[name], after[name])}
    assert all(".layers.1." in name for name in changed)
    assert len(changed) == 14


def test_lora_on_embeddings_is_kept_and_reported(lora_model, samples):
    report = initialize(lora_model(target_modules=["q_proj", "embed_tokens"]), samples)
    assert report.kept == {"model.embed_tokens": "Embedding is not a linear layer"}
    assert len(report.layers) == 2


def test_the_head_is_kept_and_reported_if_its_adapter_is_the_embeddings_own(tiny_llama, lora_model, samples):
    model = lora_model(
        model=tiny_llama(tie_word_embeddings=True),
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )
    before = {name: tensor for name, tensor in adapter_weights(model).items() if "q_proj" not in name}
    report = initialize(model, samples)
    assert report.kept == {
        "model.embed_tokens": "Embedding is not a linear layer",
        "lm_head": "its adapter is the one of the embeddings (ensure_weight_tying)",
    }
    assert report.search_loss_after < report.search_loss_before
    assert_same_tensors({name: adapter_weights(model)[name] for name in before}, before)


def test_a_rank_above_every_input_size(lora_model, samples):
    model = lora_model(r=49, target_modules=["q_proj"])
    refuses(TargetError, "None of the 2 LoRA layers .* rank 49 is above its input size 48", model, samples)


# Layers that the data does not reach


def add_unused_layer(model):
    model.model.layers[0].unused_proj = nn.Linear(48, 48)
    return model


def test_a_layer_that_is_never_called_is_kept_on_request(tiny_llama, lora_model, samples):
    model = lora_model(model=add_unused_layer(tiny_llama()), target_modules=["q_proj", "unused_proj"])
    report = initialize(model, samples, config=make_config(uncalled_layers="keep"))
    assert report.kept == {"model.layers.0.unused_proj": "no sample goes through it"}
    assert len(report.layers) == 2


def test_no_layer_that_is_called_is_an_error_even_if_uncalled_ones_may_be_kept(tiny_llama, lora_model, samples):
    model = lora_model(model=add_unused_layer(tiny_llama()), target_modules=["unused_proj"])
    config = make_config(uncalled_layers="keep")
    refuses(TapNotCalledError, "The taps of 1 of 1 layers were never called", model, samples, config=config)


def test_a_loss_that_is_cut_off_from_the_model(lora_model, samples):
    def detached(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        return model(**batch, **extra).loss.detach()

    refuses(
        TapNotCalledError,
        "No gradient came back to any tapped layer: the loss is cut off from the model",
        lora_model(),
        samples,
        compute_loss=detached,
    )


def test_a_gradient_that_is_zero_everywhere(lora_model, samples):
    def flat(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        loss = model(**batch, **extra).loss
        return loss.detach() + 0 * loss

    refuses(SolveError, "No layer could be solved. .*: its gradient is zero", lora_model(), samples, compute_loss=flat)


# The samples


def test_no_sample(lora_model):
    refuses(DataError, "There is no sample to take statistics from", lora_model(), [])


def test_no_sample_in_a_stream(lora_model):
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    refuses(DataError, "There is no sample to take statistics from", lora_model(), Empty(), population_size=3)


def test_a_stream_of_unknown_size(lora_model, samples):
    refuses(DataError, r"a stream, so its size is not known. Give population_size", lora_model(), iter(samples))


def test_what_is_no_collection(lora_model):
    refuses(DataError, "samples is a int; give a list, a data set or a data loader", lora_model(), 3)


def unlabelled(sample):
    return {**sample, "labels": [-100] * len(sample["input_ids"])}


def test_no_label_anywhere(lora_model, samples):
    refuses(
        DataError,
        r"None of the 12 samples has a label that counts \(all are -100\). Check how labels are masked",
        lora_model(),
        [unlabelled(sample) for sample in samples],
    )


def test_a_label_at_the_first_position_alone_is_none(lora_model, samples):
    shifted_away = [{**s, "labels": [s["input_ids"][0], *[-100] * (len(s["input_ids"]) - 1)]} for s in samples]
    refuses(DataError, "None of the 12 samples has a label that counts", lora_model(), shifted_away)


def test_without_a_label_in_the_samples_of_the_line_search_another_one_is_taken(lora_model, samples):
    rows = [unlabelled(s) if number >= 12 else s for number, s in enumerate(samples)]
    report = initialize(lora_model(), rows, config=make_config(sample_selection="head"))
    assert (report.num_samples, report.num_search_samples, report.num_unseen_samples) == (11, 1, 0)
    assert report.search_loss_after <= report.search_loss_before
    assert report.unseen_loss_before is None


def test_one_labelled_sample_is_not_enough_for_a_line_search(lora_model, samples):
    rows = [unlabelled(s) if number else s for number, s in enumerate(samples)]
    refuses(
        DataError,
        "One sample alone has a label, .* or a step_size",
        lora_model(),
        rows,
        config=make_config(sample_selection="head"),
    )


def test_samples_without_a_label_are_counted_and_change_nothing_else(lora_model, samples):
    rows = [*samples[:10], unlabelled(samples[10]), unlabelled(samples[11])]
    config = make_config(sample_selection="head", step_size=0.1, population_size=10)
    some, fewer = lora_model(), lora_model()
    report = initialize(some, rows, config=config)
    assert (report.num_samples, report.num_unlabelled) == (10, 2)
    assert "2 samples have no label and were left out" in report.notes
    initialize(fewer, samples[:10], config=config)
    weights, expected = adapter_weights(some), adapter_weights(fewer)
    for name, b in expected.items():
        if "lora_B" in name:
            a = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(weights[name] @ weights[a], b @ expected[a], rtol=1e-4, atol=1e-6)


def test_samples_without_labels_at_all(lora_model, samples):
    rows = [{"input_ids": sample["input_ids"]} for sample in samples]
    refuses(DataError, r"The model returned no loss from .*input_ids.*. Add labels", lora_model(), rows)


def test_a_sample_that_is_too_long(lora_model, samples):
    rows = [*samples[:5], {"input_ids": [5] * 65, "labels": [5] * 65}, *samples[6:]]
    rows = [{key: sample[key] for key in ("input_ids", "labels")} for sample in rows]
    table = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    refuses(
        DataError,
        r"A sample has 65 tokens and the model allows 64 \(max_position_embeddings\). Truncate samples to 64 tokens",
        lora_model(model=table, target_modules=["c_fc"], fan_in_fan_out=True),
        rows,
        config=make_config(sample_selection="head"),
    )


def test_a_sample_of_the_longest_length_is_no_error(lora_model, samples):
    rows = [*samples[:11], {"input_ids": [5] * 64, "attention_mask": [1] * 64, "labels": [5] * 64}, *samples[12:]]
    assert initialize(lora_model(), rows, config=make_config(sample_selection="head")).num_samples == 12


def test_one_sample_and_a_line_search(lora_model, samples):
    refuses(DataError, "There is one sample only, and the line search needs one", lora_model(), samples[:1])


def test_one_sample_and_a_step(lora_model, samples):
    assert initialize(lora_model(), samples[:1], config=make_config(step_size=0.1)).num_samples == 1


def test_samples_of_another_form(lora_model):
    refuses(DataError, "A sample is a str; it must map names", lora_model(), ["some text"] * 20)


def test_samples_that_hold_text(lora_model, samples):
    rows = [{**sample, "text": "words"} for sample in samples]
    refuses(DataError, "The sample's 'text' is a str, which cannot be made a tensor", lora_model(), rows)


def test_samples_of_different_keys(lora_model, samples):
    rows = [s if n % 2 else {"input_ids": s["input_ids"], "labels": s["labels"]} for n, s in enumerate(samples)]
    refuses(DataError, "Samples have different keys", lora_model(), rows)


def test_a_collator_that_makes_something_else(lora_model, samples):
    refuses(
        DataError,
        "The data collator made a list; it must make a mapping of tensors",
        lora_model(),
        samples,
        data_collator=list,
    )


def test_a_loss_that_takes_other_arguments(lora_model, samples):
    with pytest.raises(DataError, match=r"as compute_loss\(model, batch, num_items\): too many positional arguments"):
        initialize_lora_da(lora_model(), samples, compute_loss=lambda model, batch: model(**batch).loss, progress=False)


@pytest.mark.parametrize(
    ("value", "what"), [(1.0, "a float"), ((torch.zeros(()), None), "a tuple"), (torch.zeros(3), r"a tensor \[3\]")]
)
def test_a_loss_that_is_no_scalar_tensor(lora_model, samples, value, what):
    with pytest.raises(
        DataError, match=f"compute_loss returned {what}, .* must return a scalar tensor.*LoRADACallback"
    ):
        initialize_lora_da(lora_model(), samples, compute_loss=lambda model, batch, num_items: value, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(lora_model, samples, value):
    def loss(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        return model(**batch, **extra).loss * value

    refuses(
        NonFiniteError,
        f"The loss of a batch is {value}. Check the samples",
        lora_model(),
        samples,
        compute_loss=loss,
    )


@pytest.mark.parametrize(("kind", "first"), [("search", 12), ("unseen", 15)])
def test_a_loss_that_is_not_finite_on_other_samples_than_those_of_the_statistics(lora_model, samples, kind, first):
    broken = range(first, first + 3)
    rows = [{**s, "input_ids": [95, *s["input_ids"][1:]]} if i in broken else s for i, s in enumerate(samples)]

    def loss(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        value = model(**batch, **extra).loss
        return value * float("nan") if (batch["input_ids"] == 95).any() else value

    refuses(
        NonFiniteError,
        f"The loss of the 3 {kind} samples is nan without any adapter",
        lora_model(),
        rows,
        compute_loss=loss,
        config=make_config(sample_selection="head"),
    )


def test_a_weight_that_is_not_finite(tiny_llama, lora_model, samples):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    refuses(NonFiniteError, "The loss of a batch is nan", lora_model(model=model), samples, data_collator=collate)


# Settings, and where it is written


@pytest.mark.parametrize("alpha", [0, -8])
def test_a_scaling_with_which_no_step_can_be_written(lora_model, samples, alpha):
    refuses(TargetError, r"is scaled by (0|-2), with which no step can be", lora_model(lora_alpha=alpha), samples)


def test_settings_that_are_no_settings(lora_model, samples):
    with pytest.raises(ConfigError, match=r"settings are a dict. Give a LoRADAConfig"):
        initialize(lora_model(), samples, config={"num_samples": 8})
    refuses(ConfigError, "batch_size=-3 must be at least 1", lora_model(), samples, batch_size=-3)
    config = make_config(save_statistics=True)
    refuses(ConfigError, "save_statistics needs an output_dir", lora_model(), samples, config=config)


def test_nothing_but_an_initialisation_is_ever_replaced(lora_model, samples, tmp_path):
    other = tmp_path / "run"
    (other / "checkpoint-500").mkdir(parents=True)
    (other / "checkpoint-500" / "model.bin").write_text("weeks of work")
    refuses(
        ConfigError, r"holds something else than an init.*\(checkpoint-500\)", lora_model(), samples, output_dir=other
    )
    assert (other / "checkpoint-500" / "model.bin").read_text() == "weeks of work"
    file = tmp_path / "script.py"
    file.write_text("pass")
    refuses(ConfigError, "script.py is a file", lora_model(), samples, output_dir=file)
    refuses(ConfigError, "does not name a folder of its own", lora_model(), samples, output_dir=".")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuses(ConfigError, "link is a link to nothing", lora_model(), samples, output_dir=tmp_path / "link")
    trained = tmp_path / "adapter"
    lora_model().save_pretrained(trained)
    refuses(ConfigError, "holds something else", lora_model(), samples, output_dir=trained)
    init = tmp_path / "init"
    initialize(lora_model(), samples, output_dir=init)
    (init / "thesis.txt").write_text("do not lose")
    changed = make_config(search_samples=2)
    refuses(ConfigError, r"\(thesis.txt\), which would be lost", lora_model(), samples, output_dir=init, config=changed)
    (init / "thesis.txt").unlink()
    assert initialize(lora_model(), samples, output_dir=init, config=changed).num_search_samples == 2


def test_a_folder_that_cannot_be_written_is_found_out_before_the_pass(lora_model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "solve_windows", lambda *_: pytest.fail("the pass ran"))
    (tmp_path / "file").write_text("kept")
    refuses(
        ConfigError,
        r"cannot be written to .*init \(.*\). Name a folder that can be written",
        lora_model(),
        samples,
        output_dir=tmp_path / "file" / "init",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_initialisation_is_used_where_nothing_can_be_written(lora_model, samples, tmp_path, monkeypatch):
    initialize(lora_model(), samples, output_dir=tmp_path / "init")
    monkeypatch.setattr(run, "check_writable", lambda _: pytest.fail("it is written"))
    assert any("made before" in note for note in initialize(lora_model(), samples, output_dir=tmp_path / "init").notes)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none(lora_model, samples, seed):
    refuses(ConfigError, rf"seed={seed} must be between 0 and 2\*\*32", lora_model(), samples, seed=seed)
