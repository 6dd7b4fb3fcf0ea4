import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch
from harness import (
    LINEAR_LAYERS,
    adapter_weights,
    assert_same_tensors,
    assert_statistics_equal,
    autograd_statistics,
    base_linear_layers,
    collate,
    factors,
    items_of,
    make_config,
    make_learnable_samples,
    make_lora_config,
    relative_error,
)
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import lora_da_hf.pipeline.run as run_module
import lora_da_hf.pipeline.windows as windows_module
from lora_da_hf import LoRADAConfig, apply_init, initialize_lora_da
from lora_da_hf.adapters import write as write_module
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ConfigError, UnsupportedLayerError
from lora_da_hf.theory.adapter_factors import DEFAULT_ROW_NORM


@pytest.fixture
def samples():
    return make_learnable_samples(24)


def initialize(model, samples, folder=None, *, config=None, data_collator=None, compute_loss=None, **overrides):
    return initialize_lora_da(
        model,
        samples,
        config=config or make_config(**overrides),
        data_collator=data_collator,
        compute_loss=compute_loss,
        output_dir=folder,
        progress=False,
    )


def stored_statistics(folder):
    stored = load_init(folder)
    return load_statistics(stored.folder, stored.manifest)


def token_loss(model, samples):
    """Compute the mean loss over the labels of all samples, one sample at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            batch = collate([sample])
            logits = model.eval()(input_ids=batch["input_ids"]).logits[0, :-1].double()
            labels = batch["labels"][0, 1:]
            total += cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def sample_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[0, :-1], batch["labels"][0, 1:])


def update_of(model):
    """Return what PEFT adds to each weight: ``scaling * B @ A``."""
    return {
        name: layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }


# The data


def test_statistics_are_those_of_autograd(tmp_path, lora_model, samples):
    report = initialize(lora_model(), samples, tmp_path / "init", sample_selection="head", save_statistics=True)
    expected = autograd_statistics(lora_model(), samples[:12], sample_loss, items_of=items_of(report))
    assert_statistics_equal(stored_statistics(tmp_path / "init"), expected, 2e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_data_loader_gives_what_its_data_set_and_collator_give(lora_model, samples, batch_size):
    listed, loaded = lora_model(), lora_model()
    first = initialize(listed, samples, data_collator=collate)
    loader = DataLoader(samples, batch_size=batch_size, collate_fn=collate, shuffle=True)
    second = initialize(loaded, loader)
    assert_same_tensors(adapter_weights(loaded), adapter_weights(listed))
    assert second.data_fingerprint == first.data_fingerprint


def test_the_default_collator_pads_like_any_other(lora_model, samples):
    own, other = lora_model(), lora_model()
    initialize(own, samples)
    initialize(other, samples, data_collator=collate)
    assert_same_tensors(adapter_weights(own), adapter_weights(other))


def test_fewer_samples_than_asked_are_used_and_noted(lora_model, samples):
    report = initialize(lora_model(), samples, config=LoRADAConfig())
    assert (report.num_samples, report.num_search_samples, report.num_unseen_samples) == (18, 3, 3)
    assert "18 samples for the statistics instead of 256: there are 24" in report.notes
    assert "18 samples for the statistics instead of 256" in str(report)


def test_the_same_inputs_give_the_same_bits(lora_model, samples):
    one, two = lora_model(), lora_model()
    first = initialize(one, samples)
    torch.rand(7)
    second = initialize(two, samples)
    assert_same_tensors(adapter_weights(one), adapter_weights(two))
    assert first.search == second.search
    third = initialize(lora_model(), samples, seed=1)
    assert third.data_fingerprint != first.data_fingerprint


def test_random_state_and_mode_are_as_before(lora_model, samples):
    model = lora_model()
    model.train()
    model.get_base_model().model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    initialize(model, samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())


class AugmentedSamples(torch.utils.data.Dataset):
    """Samples that are drawn anew whenever they are read."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        shift = int(torch.randint(0, 5, ())) + random.randrange(5)
        sample = self.samples[index]
        return {**sample, "input_ids": [3 + (int(i) + shift) % 20 for i in sample["input_ids"]]}


def test_a_data_set_that_draws_at_random_leaves_the_generators_alone(lora_model, samples):
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate()
    first = initialize(lora_model(), AugmentedSamples(samples))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(6)
    assert initialize(lora_model(), AugmentedSamples(samples)).data_fingerprint == first.data_fingerprint


def test_dropout_plays_no_part(tmp_path, tiny_llama, lora_model, samples):
    quiet = initialize(lora_model(), samples)
    noisy_model = lora_model(model=tiny_llama(attention_dropout=0.5), lora_dropout=0.5)
    noisy_model.train()
    noisy = initialize(noisy_model, samples)
    assert noisy.search == quiet.search


def test_layers_of_gpt2s_kind_are_initialised_too(tmp_path, samples):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = get_peft_model(
        GPT2LMHeadModel(config), make_lora_config(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    )
    report = initialize(model, samples, tmp_path / "init")
    assert len(report.layers) == 8
    shapes = {
        (entry.in_features, entry.out_features) for entry in load_init(tmp_path / "init").manifest.layers.values()
    }
    assert shapes == {(48, 144), (48, 48), (48, 192), (192, 48)}
    assert report.search_loss_after < report.search_loss_before


# The step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_the_search_samples_does_not_rise(tiny_llama, lora_model, samples, dtype):
    model = lora_model(model=tiny_llama(dtype=dtype), autocast_adapter_dtype=False)
    untouched = lora_model(model=tiny_llama(dtype=dtype), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    report = initialize(model, samples, sample_selection="head")
    search, unseen = 12 + report.num_search_samples, report.num_unseen_samples
    assert search > 12
    assert unseen > 0
    before, after = (token_loss(m, samples[12:search]) for m in (untouched, model))
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    assert report.search_loss_before == pytest.approx(before, rel=tolerance)
    assert report.search_loss_after == pytest.approx(after, rel=tolerance)
    assert after < before
    assert report.unseen_loss_after == pytest.approx(
        token_loss(model, samples[search : search + unseen]), rel=tolerance
    )


def test_the_step_is_the_best_of_those_tried(lora_model, samples):
    report = initialize(lora_model(), samples)
    losses = dict(report.search)
    assert len(losses) >= 4
    assert losses[report.step_size] == min(losses.values())
    assert report.search_loss_after == pytest.approx(losses[report.step_size], rel=1e-5)
    assert min(losses) < report.step_size < max(losses)


def test_the_update_of_each_layer_is_the_step_times_the_stored_basis(tmp_path, lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, tmp_path / "init")
    bases = load_init(tmp_path / "init").bases
    for name, update in update_of(model).items():
        expected = report.step_size * bases[name].basis_B @ bases[name].basis_A
        assert relative_error(update, expected) < 1e-5
    norms = {layer.name: layer.update_norm for layer in report.layers}
    assert norms == {name: pytest.approx(update.norm().item(), rel=1e-4) for name, update in update_of(model).items()}


def uphill(model, batch, num_items):
    """Compute the loss with its gradient negated."""
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    loss = model(**batch, **extra).loss
    return 2 * loss.detach() - loss


def test_if_no_step_helps_b_is_zero_and_the_report_says_so(tmp_path, lora_model, samples):
    model = lora_model()
    before = token_loss(model, samples)
    report = initialize(model, samples, tmp_path / "init", compute_loss=uphill)
    weights = adapter_weights(model)
    assert report.step_size == 0
    assert report.search_loss_after == report.search_loss_before
    assert any("no step lowers the loss on the search samples: B is zero" in note for note in report.notes)
    assert not any(b.any() for b in factors(weights, "B").values())
    for a in factors(weights, "A").values():
        torch.testing.assert_close(a.norm(dim=1), torch.full((4,), DEFAULT_ROW_NORM))
    assert token_loss(model, samples) == before
    assert load_init(tmp_path / "init").report.step_size == 0


def test_a_step_that_does_not_help_once_it_is_written_is_taken_back(lora_model, samples):
    def worse_once_written(model, batch, num_items):
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        written = any(b.any() for b in factors(adapter_weights(model), "B").values())
        return model(**batch, **extra).loss * (10 if written else 1)

    model = lora_model()
    report = initialize(model, samples, compute_loss=worse_once_written)
    assert min(loss for _, loss in report.search) < report.search_loss_before  # the search itself found a step
    assert report.step_size == 0
    assert set(report.step_size_by_rank.values()) == {0.0}
    assert report.search_loss_after == report.search_loss_before
    assert any("once it was stored in the adapter's dtype" in note for note in report.notes)
    assert not any(b.any() for b in factors(adapter_weights(model), "B").values())
    assert {layer.update_norm for layer in report.layers} == {0.0}


def test_a_number_is_the_step(lora_model, samples):
    model = lora_model()
    report = initialize(model, samples, step_size=0.25)
    assert report.step_size == 0.25
    assert report.search == []
    assert report.search_loss_before is None
    farthest = max(report.layers, key=lambda layer: layer.displacement_norm).name
    norms = {name: torch.linalg.matrix_norm(update, 2).item() for name, update in update_of(model).items()}
    assert norms[farthest] == max(norms.values()) == pytest.approx(0.25, rel=1e-3)
    assert min(norms.values()) > 0


def test_stable_gamma_is_the_papers_way_to_say_the_step(tmp_path, lora_model, samples):
    model = lora_model(alpha_pattern={"up_proj": 2})
    report = initialize(model, samples, tmp_path / "init", step_size=None, stable_gamma=64.0)
    bases = load_init(tmp_path / "init").bases
    assert report.step_size is None
    assert load_init(tmp_path / "init").report.step_size is None
    for name, update in update_of(model).items():
        scaling = 0.5 if "up_proj" in name else 4.0
        assert relative_error(update, scaling / 64 * bases[name].basis_B @ bases[name].basis_A) < 1e-5


def test_the_papers_preset_splits_by_the_square_root_of_gamma(tmp_path, lora_model, samples):
    model = lora_model()
    initialize(model, samples, tmp_path / "init", config=LoRADAConfig.paper(num_samples=12, input_damping=1e-3))
    bases = load_init(tmp_path / "init").bases
    weights = adapter_weights(model)
    for name, basis in bases.items():
        prefix = f"base_model.model.{name}"
        torch.testing.assert_close(weights[f"{prefix}.lora_A.weight"], basis.basis_A / 32)
        torch.testing.assert_close(weights[f"{prefix}.lora_B.weight"], basis.basis_B / 32)


@pytest.mark.parametrize("split", ["default_norm", "orthonormal", "balanced"])
def test_every_split_gives_the_same_product(lora_model, samples, split):
    model, reference = lora_model(), lora_model()
    initialize(model, samples, step_size=0.1, factor_split=split)
    initialize(reference, samples, step_size=0.1)
    expected = update_of(reference)
    for name, update in update_of(model).items():
        assert relative_error(update, expected[name]) < 1e-5
    if split == "default_norm":
        for a in factors(adapter_weights(model), "A").values():
            torch.testing.assert_close(a.norm(dim=1), torch.full((4,), DEFAULT_ROW_NORM))
    if split == "balanced":
        weights = adapter_weights(model)
        for name, a in factors(weights, "A").items():
            b = weights[name.replace("lora_A", "lora_B")]
            torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b)[:4], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", ["weights", "fisher"])
def test_steps_by_layer_are_searched_stored_and_read(tmp_path, lora_model, samples, metric):
    model, reference = lora_model(), lora_model()
    report = initialize(model, samples, tmp_path / "init", metric=metric)
    initialize(reference, samples, metric=metric, layer_steps="equal")
    assert report.search_loss_after < report.search_loss_before
    again = lora_model()
    apply_init(again, tmp_path / "init")
    expected, norms = update_of(reference), []
    stored = update_of(again)
    for name, update in update_of(model).items():
        assert relative_error(update, stored[name]) < 1e-5
        norms.append(update.norm().item() / expected[name].norm().item())
        assert relative_error(update, norms[-1] * expected[name]) < 1e-4
    assert max(norms) > 1.5 * min(norms)
    assert report.step_unit == max(layer.displacement_norm / layer.num_grad_tokens for layer in report.layers)
    assert [one.search[0][0] for one in (report, initialize(lora_model(), samples, layer_steps="equal"))] == [1.0, 0.1]


def test_a_larger_max_rank_is_stored_and_changes_nothing_that_is_written(tmp_path, lora_model, samples):
    plain, large = lora_model(), lora_model()
    initialize(plain, samples, tmp_path / "plain", step_size=0.1)
    initialize(large, samples, tmp_path / "large", step_size=0.1, max_rank=16)
    expected = update_of(plain)
    for name, update in update_of(large).items():
        assert relative_error(update, expected[name]) < 1e-5
    assert {basis.basis_A.shape[0] for basis in load_init(tmp_path / "large").bases.values()} == {16}
    assert {basis.basis_A.shape[0] for basis in load_init(tmp_path / "plain").bases.values()} == {4}


def test_a_max_rank_below_the_adapters_rank_is_an_error(tmp_path, lora_model, samples):
    with pytest.raises(ConfigError, match=r"max_rank=2 is below the adapter's rank, 4, .* Leave it out, or give more"):
        initialize(lora_model(), samples, tmp_path / "init", step_size=0.1, max_rank=2)
    assert not (tmp_path / "init").exists()


def test_a_max_rank_above_the_input_size_is_cut_to_it(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", step_size=0.1, max_rank=500)
    sizes = {layer.max_rank - layer.in_features for layer in load_init(tmp_path / "init").manifest.layers.values()}
    assert sizes == {0}


def test_steps_for_other_ranks_are_searched_for_what_is_stored(lora_model, samples, tmp_path):
    report = initialize_lora_da(
        lora_model(), samples, config=make_config(max_rank=16), output_dir=tmp_path / "init", progress=False
    )
    assert set(report.step_size_by_rank) == {1, 4, 16}
    assert report.step_size_by_rank[4] == report.step_size
    assert all(step > 0 for step in report.step_size_by_rank.values())


def test_freeze_a_leaves_b_alone_trainable(lora_model, samples):
    model = lora_model()
    initialize(model, samples, freeze_a=True)
    assert all(p.requires_grad == ("lora_B" in name) for name, p in model.named_parameters())


# Quantised bases


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra"
)


NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("bits", "settings"), [(4, {}), (4, NF4), (8, {})], ids=["fp4", "nf4", "int8"])
def test_statistics_through_quantised_layers_are_those_of_the_weights_they_stand_for(
    tmp_path, tiny_llama, lora_model, samples, bits, settings
):
    size = {"hidden_size": 64, "intermediate_size": 128}
    tiny_llama(**size).save_pretrained(tmp_path / "base")
    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, **settings}
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings),
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )
    model = lora_model(model=quantised)
    plain = tiny_llama(**size)
    kinds = set()
    with torch.no_grad():
        for name, layer in base_linear_layers(model).items():
            kinds.add(type(layer).__name__)
            plain.get_submodule(name).weight.copy_(dequantised(layer, bits))
    assert kinds == {f"Linear{'4bit' if bits == 4 else '8bitLt'}"}
    stored = {name: layer.weight.data.clone() for name, layer in base_linear_layers(model).items()}
    settings = {"sample_selection": "head", "save_statistics": True}
    report = initialize(model, samples, tmp_path / "quantised", **settings)
    initialize(lora_model(model=plain), samples, tmp_path / "plain", **settings)
    assert len(report.layers) == LINEAR_LAYERS
    assert report.search_loss_after < report.search_loss_before
    found, expected = (stored_statistics(tmp_path / which) for which in ("quantised", "plain"))
    assert_statistics_equal(found, expected, 1e-4 if bits == 4 else 0.1)
    assert_same_tensors({name: layer.weight.data for name, layer in base_linear_layers(model).items()}, stored)
    assert all(tensor.any() for tensor in factors(adapter_weights(model), "B").values())


def test_a_4_bit_weight_that_is_packed_for_inference_is_an_error(lora_model, samples):
    model = lora_model()
    layer = next(iter(base_linear_layers(model).values()))
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # as bitsandbytes marks it
    with pytest.raises(UnsupportedLayerError, match="packed for inference on the CPU, which lets no gradient through"):
        initialize(model, samples)


class PackedLinear(nn.Module):
    """A stand-in for a layer of GPTQ's or AWQ's kind: no linear one of torch's, and its weight is no parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    @property
    def dequantised(self):
        return self.qweight * self.scale

    def forward(self, x):
        return x @ self.dequantised.T


class InferenceLinear(PackedLinear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class TupleLinear(PackedLinear):
    def forward(self, x):
        return super().forward(x), None


def packed_model(lora_model, kind=PackedLinear):
    """Make a model with every base layer of one of these kinds, and a plain one with the same weights."""
    model, plain = lora_model(), lora_model()
    for (name, layer), other in zip(base_linear_layers(model).items(), base_linear_layers(plain).values(), strict=True):
        packed = kind(layer)
        model.get_base_model().get_submodule(name).base_layer = packed
        with torch.no_grad():
            other.weight.copy_(packed.dequantised)
    return model, plain


def test_statistics_through_packed_layers_are_those_of_the_weights_they_stand_for(tmp_path, lora_model, samples):
    model, plain = packed_model(lora_model)
    settings = {"sample_selection": "head", "save_statistics": True}
    report = initialize(model, samples, tmp_path / "packed", **settings)
    initialize(plain, samples, tmp_path / "plain", **settings)
    assert len(report.layers) == LINEAR_LAYERS
    assert_statistics_equal(stored_statistics(tmp_path / "packed"), stored_statistics(tmp_path / "plain"), 1e-5)
    assert all(tensor.any() for tensor in factors(adapter_weights(model), "B").values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            InferenceLinear,
            r"q_proj: its base layer, a .*InferenceLinear, cannot be differentiated \(.*does not require",
        ),
        (TupleLinear, r"q_proj: its base layer, a .*TupleLinear, does not map its input to a tensor \[1, \d+, 48\]"),
    ],
)
def test_a_packed_layer_without_a_plain_output_or_a_backward_is_an_error(lora_model, samples, kind, message):
    model, _ = packed_model(lora_model, kind)
    before = adapter_weights(model)
    with pytest.raises(UnsupportedLayerError, match=message):
        initialize(model, samples)
    assert_same_tensors(adapter_weights(model), before)


def dequantised(layer, bits):
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if bits == 4:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


# Failure


def test_a_failure_in_any_stage_puts_the_adapter_back(tmp_path, lora_model, samples, monkeypatch):
    stages = {run_module: ("probe", "identify", "plan_windows", "find_step", "write_adapter", "save_init")}
    stages[windows_module] = ("gather_statistics", "solve")
    for module, stage in [(module, stage) for module, names in stages.items() for stage in names]:
        model = lora_model()
        before = adapter_weights(model)

        def fails(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, stage, fails)
            with pytest.raises(KeyboardInterrupt):
                initialize(model, samples, tmp_path / stage)
        assert_same_tensors(adapter_weights(model), before)
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        assert not any(layer._forward_hooks for layer in base_linear_layers(model).values())


def test_a_failure_in_the_middle_of_the_write_puts_the_adapter_back(lora_model, samples, monkeypatch):
    import lora_da_hf.pipeline.step as step_module

    model = lora_model()
    before = adapter_weights(model)
    written = []

    def fails_at_the_fifth(target, lora_A, lora_B):
        written.append(target.name)
        if len(written) == 5:
            raise RuntimeError("no more")
        write_module.write_factors(target, lora_A, lora_B)

    monkeypatch.setattr(step_module, "write_factors", fails_at_the_fifth)
    with pytest.raises(RuntimeError, match="no more"):
        initialize(model, samples)
    assert len(set(written)) == 5
    assert_same_tensors(adapter_weights(model), before)
    monkeypatch.undo()
    other = lora_model()
    initialize(model, samples)
    initialize(other, samples)
    assert_same_tensors(adapter_weights(model), adapter_weights(other))


def mask_at_random(samples):
    """Leave out a random half of the labels, as masked language models do."""
    batch = collate(samples)
    labels = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("memory_budget", [None, 350_000])
def test_a_collator_that_draws_at_random_makes_the_same_batches_for_every_step(lora_model, samples, memory_budget):
    report = initialize(lora_model(), samples, data_collator=mask_at_random, memory_budget=memory_budget, max_rank=4)
    again = initialize(lora_model(), samples, data_collator=mask_at_random, max_rank=4)
    steps = dict(report.search)
    assert report.step_size > 0
    assert report.search_loss_after == pytest.approx(steps[report.step_size], rel=1e-6)
    assert [layer.eigenvalues for layer in report.layers] == [layer.eigenvalues for layer in again.layers]
