"""Files for PEFT's own starts and for llama.cpp, each read by the program that it is for."""

import gguf
import peft
import pytest
import torch
from harness import initialize, make_config, make_learnable_samples
from oracles import collate, lora_layers, relative_error, stored_statistics
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file

from lora_da_hf import export_init
from lora_da_hf.errors import ConfigError

RANK = 4
SAMPLES = [sample for sample in make_learnable_samples(64) if sum(sample["attention_mask"]) == 10][:8]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # CorDA knows no all-linear


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    from conftest import make_lora_model

    folder = tmp_path_factory.mktemp("stored") / "init"
    config = make_config(num_samples=8, search_samples=1, step_size=0.1, save_statistics=True)
    initialize(make_lora_model(r=RANK), SAMPLES, folder, config=config)
    return folder


def config_of(start, **settings):
    return LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, init_lora_weights=start, **settings)


def whole_weights(model):
    return {n: m.base_layer.weight + m.get_delta_weight("default") for n, m in lora_layers(model).items()}


def assert_same_start(found, expected, *, any_sign=False, tolerance=1e-3):
    """Compare what two models add to their bases, and what both are together."""
    theirs = lora_layers(expected)
    for name, layer in lora_layers(found).items():
        if any_sign:
            for factor in ("lora_A", "lora_B"):
                ours, other = (getattr(x, factor)["default"].weight.detach().abs() for x in (layer, theirs[name]))
                assert relative_error(ours, other) <= tolerance, name
        else:
            product, other = (x.get_delta_weight("default").detach() for x in (layer, theirs[name]))
            assert relative_error(product, other) <= tolerance, name
        assert relative_error(whole_weights(found)[name], whole_weights(expected)[name]) <= 1e-5, name


def test_corda_starts_from_the_file_as_from_its_own_pass(stored, tmp_path, tiny_llama):
    assert export_init(stored, tmp_path / "cov.pt", to="corda") == []
    made = []
    for settings in ({"covariance_file": str(tmp_path / "cov.pt")}, {}):
        model = tiny_llama()
        config = config_of("corda", corda_config=CordaConfig(corda_method="ipm", **settings))

        def one_sample_of_all(model=model):  # it scales each batch by its maximum, so one batch tells nothing of that
            joined = {"input_ids": torch.cat([torch.tensor(sample["input_ids"]) for sample in SAMPLES])[None]}
            mask = torch.full((80, 80), float("-inf"))
            for start in range(0, 80, 10):
                mask[start : start + 10, start : start + 10] = torch.full((10, 10), float("-inf")).triu(1)
            with torch.no_grad():
                model(
                    **joined,
                    attention_mask=mask[None, None],
                    position_ids=torch.arange(10).repeat(8)[None],
                )

        preprocess_corda(model, config, run_model=None if settings else one_sample_of_all)
        made.append(get_peft_model(model, config))
    assert_same_start(*made)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_lora_ga_starts_from_the_file_as_from_its_own_pass(stored, tmp_path, tiny_llama):
    export_init(stored, tmp_path / "grad.pt", to="lora_ga")
    made = []
    for cache in (str(tmp_path / "grad.pt"), None):
        model, config = tiny_llama(), config_of("lora_ga", lora_ga_config=LoraGAConfig())

        def step(model=model):
            model(**collate(SAMPLES)).loss.backward()

        peft.preprocess_loraga(model, config, step, cache_file=cache)
        torch.manual_seed(0)
        made.append(get_peft_model(model, config))
    assert_same_start(*made, any_sign=True)  # its randomised SVD leaves the sign of each direction open


def test_eva_starts_from_the_file_as_from_its_own_pass(stored, tmp_path, tiny_llama):
    export_init(stored, tmp_path / "eva.safetensors", to="eva")
    eva, made = EvaConfig(rho=1.0, use_label_mask=False), []
    for state in (load_file(tmp_path / "eva.safetensors"), None):
        made.append(get_peft_model(tiny_llama(), config_of("eva", eva_config=eva), low_cpu_mem_usage=True))
        data = None if state else [collate(SAMPLES)] * 4
        initialize_lora_eva_weights(made[-1], data, eva_state_dict=state, show_progress_bar=False)
    for name, layer in lora_layers(made[0]).items():
        ours, theirs = (lora_layers(model)[name].lora_A["default"].weight for model in made)
        assert torch.linalg.svdvals(ours @ theirs.mT).min() >= 0.99, name
        assert not layer.lora_B["default"].weight.any()


def test_an_importance_matrix_reads_back(stored, tmp_path):
    assert export_init(stored, tmp_path / "imatrix.gguf", to="imatrix") == []
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    statistics = stored_statistics(stored)
    assert len(tensors) == 2 * len(statistics)
    layer = statistics["model.layers.1.mlp.down_proj"]
    assert tensors["blk.1.ffn_down.weight.counts"] == [layer.num_input_tokens]
    expected = layer.input_second_moment.diagonal() * layer.num_input_tokens
    torch.testing.assert_close(torch.tensor(tensors["blk.1.ffn_down.weight.in_sum2"]), expected, rtol=1e-6, atol=0)


def test_nothing_is_overwritten_and_a_format_that_is_not_known_is_refused(stored, tmp_path):
    (tmp_path / "there").touch()
    for output, to in (("there", "eva"), ("new", "eve")):
        with pytest.raises(ConfigError):
            export_init(stored, tmp_path / output, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
