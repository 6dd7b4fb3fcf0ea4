"""The golden values: an independent dense computation in float64, and what the authors' own code gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.records import LayerStatistics, UpperTriangle
from lora_da_hf.theory.solve import factorize, solve_layer
from lora_da_hf.theory.steps import paper_step_size, split_factors

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
STATISTICS = load_file(GOLDEN / "statistics.safetensors")
PRODUCTS = load_file(GOLDEN / "products.safetensors")
AUTHORS = load_file(GOLDEN / "authors.safetensors")
MODULES = [name.removeprefix("weight_grad/") for name in STATISTICS if name.startswith("weight_grad/")]
SHARES_INPUT_WITH = {"q_proj": "k_proj", "v_proj": "k_proj", "up_proj": "gate_proj"}


def config_of(case, **overrides):
    fields = CASES[case]
    ratio = fields.get("output_damping_ratio")
    settings = {
        "num_samples": 24,
        "variance_weight": fields["variance_beta"] / fields["bias_alpha"],
        "input_damping": fields["damping"],
        "output_damping": f"{ratio}*median" if ratio else fields["damping"],
        "stable_gamma": float(fields["gamma"]),
        "factor_split": "balanced" if fields.get("balance_factors") else "orthonormal",
        "layer_steps": "equal" if fields["normalize_delta"] else "displacement",
        "normalize_guidance_terms": fields.get("normalize_variance_guidance", False),
        "token_mask": fields.get("fisher_token_mask", "attention"),
    }
    return LoRADAConfig.paper(**settings | overrides)


def golden_statistics(module, mask):
    parent, _, kind = module.rpartition(".")
    leader = f"{parent}.{SHARES_INPUT_WITH.get(kind, kind)}"
    weight_grad = STATISTICS[f"weight_grad/{module}"]
    return LayerStatistics(
        input_second_moment=UpperTriangle(
            entries=STATISTICS[f"{mask}/{leader}/input_second_moment"], width=weight_grad.shape[1], block=1
        ),
        output_grad_second_moment_diag=STATISTICS[f"{mask}/{module}/output_grad_second_moment_diag"],
        weight_grad=weight_grad,
        num_input_tokens=1,
        num_output_tokens=1,
    )


def expected_product(case, module):
    return PRODUCTS[f"{case}/{module}/left"].double() @ PRODUCTS[f"{case}/{module}/right"].double()


def authors_product(case, module):
    return AUTHORS[f"{case}/{module}/lora_B"].double() @ AUTHORS[f"{case}/{module}/lora_A"].double()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_from_golden_statistics_the_product_is_that_of_a_dense_float64_computation(case):
    config = config_of(case)
    rank, scaling = CASES[case]["rank"], 2.0
    assert len(MODULES) == 21
    for module in MODULES:
        statistics = golden_statistics(module, config.token_mask)
        solution = solve_layer(
            statistics,
            factorize(statistics, config, layer=module),
            config,
            layer=module,
            rank=rank,
            population_size=CASES[case]["population_size"],
        )
        lora_A, lora_B = split_factors(
            *solution.at_rank(rank),
            peft_scaling=scaling,
            step_size=paper_step_size(scaling, config.stable_gamma),
            factor_split=config.factor_split,
        )
        assert relative_error(lora_B @ lora_A, expected_product(case, module)) < 1e-8, module
        assert relative_error(lora_B @ lora_A, authors_product(case, module)) < 5e-2, module


@pytest.mark.parametrize("case", CASES)
def test_from_the_golden_model_and_samples_the_product_is_theirs(case, lora_model):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", attn_implementation="eager", dtype=torch.float64)
    model = lora_model(model=model, r=CASES[case]["rank"], autocast_adapter_dtype=False).double()
    report = initialize_lora_da(
        model,
        json.loads((GOLDEN / "samples.json").read_text()),
        config=config_of(case),
        population_size=CASES[case]["population_size"],
        progress=False,
    )
    assert report.batch_size == 1
    assert report.loss_reduction.startswith("sample_mean")
    assert len(report.layers) == 21
    for layer in report.layers:
        module = model.base_model.model.get_submodule(layer.name)
        divisor = layer.num_grad_tokens * report.step_unit if not CASES[case]["normalize_delta"] else 1.0
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight * divisor
        assert relative_error(product, expected_product(case, layer.name)) < 5e-5, layer.name
        assert relative_error(product, authors_product(case, layer.name)) < 5e-2, layer.name
