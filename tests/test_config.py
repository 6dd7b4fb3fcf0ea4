"""Settings are checked when they are made, and every message says what to give instead."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_da_hf.config import Damping, LoRADAConfig
from lora_da_hf.errors import ConfigError


def test_the_papers_preset_is_the_papers_and_takes_overrides():
    config = LoRADAConfig.paper()
    assert (config.num_samples, config.batch_size, config.loss_reduction) == (256, 1, "sample_mean")
    assert config.token_mask == "attention"
    assert config.input_damping == config.output_damping == 1e-6
    assert config.variance_weight == 0.03
    assert (config.step_size, config.stable_gamma, config.searches_step) == (None, 1024.0, False)
    assert (config.factor_split, config.layer_steps) == ("orthonormal", "equal")
    assert LoRADAConfig.paper(stable_gamma=16.0) == dataclasses.replace(config, stable_gamma=16.0)


DAMPING = 'must be a number from 0 up, or a multiple such as "0.1*mean" or "0.1*median".'
MEMORY = 'must be a number of bytes, or text such as "8GiB" or "500MB".'


@pytest.mark.parametrize(
    ("name", "value", "asked"),
    [
        ("num_samples", 0, "must be at least 1."),
        ("num_samples", 2.5, "must be a valid integer."),
        ("num_samples", True, "must be a valid integer."),
        ("batch_size", 0, "must be at least 1."),
        ("search_samples", -1, "must be at least 0."),
        ("variance_weight", -1.0, "must be at least 0."),
        ("variance_weight", math.nan, "must be a finite number."),
        ("stable_gamma", 0.0, "must be greater than 0."),
        ("freeze_a", 1, "must be a valid boolean."),
        ("token_mask", "prompt", "must be 'attention' or 'labels'."),
        *(("step_size", v, "must be greater than 0 or 'line_search'.") for v in (0.0, -1)),
        *(("step_size", v, "must be a valid number or 'line_search'.") for v in ("auto", True)),
        *(
            ("memory_budget", v, MEMORY)
            for v in (0, math.inf, "", "GiB", "8 gigs", "-1", "nan", "1..5MB", "8 GiB left")
        ),
        *(("input_damping", v, DAMPING) for v in (-1, math.nan, math.inf, "-0.1*mean", "mean", "0.1*max", "*mean", "")),
        *(("output_damping", v, DAMPING) for v in ("0.1*absolute", "0.1*", "nan*mean", "0.1mean")),
    ],
)
def test_a_bad_value_is_an_error_that_says_what_to_give(name, value, asked):
    with pytest.raises(ConfigError) as caught:
        LoRADAConfig(**{name: value})
    assert str(caught.value) == f"{name}={value!r} {asked}"


def test_a_misspelt_setting_is_an_error_that_suggests_the_right_one():
    with pytest.raises(ConfigError, match=r"'num_sample' is not a setting\. Do you mean 'num_samples'\?"):
        LoRADAConfig(num_sample=3)
    with pytest.raises(ConfigError, match="'zeta' is not a setting"):
        LoRADAConfig(zeta=1)
    with pytest.raises(ConfigError, match="by name, such as num_samples"):
        LoRADAConfig(3)


def test_a_line_search_needs_samples_and_a_fixed_step_none():
    with pytest.raises(ConfigError, match="needs search_samples of at least 1"):
        LoRADAConfig(search_samples=0)
    assert LoRADAConfig(search_samples=0, step_size=0.1).search_samples == 0


def test_a_whole_number_will_do_where_a_real_one_is_asked_for_and_so_will_text_from_the_command_line():
    assert LoRADAConfig(variance_weight=1, step_size=1, input_damping=1).variance_weight == 1
    for budget in (1024, "1024", "8GiB", "8 GB", "1.5KiB"):
        assert LoRADAConfig(memory_budget=budget).memory_budget == budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, Damping(amount=0.0)),
        ("1e-6", Damping(amount=1e-6)),
        ("0.1*mean", Damping(amount=0.1, reference="mean")),
        (" 0.1 * median ", Damping(amount=0.1, reference="median")),
    ],
)
def test_a_damping_is_read(text, expected):
    assert Damping.parse(text) == expected


@given(
    num_samples=st.integers(1, 10**6),
    variance_weight=st.floats(0, 1e6),
    input_damping=st.one_of(st.floats(0, 1e6), st.just("0.5*median")),
    step_size=st.one_of(st.none(), st.just("line_search"), st.floats(1e-9, 1e3)),
)
def test_settings_survive_json_copies_and_pickles(**settings):
    config = LoRADAConfig(**settings)
    assert LoRADAConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
