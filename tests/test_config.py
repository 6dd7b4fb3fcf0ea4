"""Settings are checked when they are made, and every message says what to give instead."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_da_hf.config import Damping, LoRADAConfig, parse_bytes
from lora_da_hf.errors import ConfigError


def test_the_default_searches_the_step_and_damps_relatively():
    config = LoRADAConfig()
    assert config.searches_step
    assert (config.input_damping, config.output_damping) == ("0.1*mean", "0.1*mean")
    assert (config.factor_split, config.sample_selection) == ("default_norm", "random")


def test_every_setting_has_a_help_text():
    for setting in dataclasses.fields(LoRADAConfig):
        assert len(setting.metadata["help"]) > 10, setting.name


def test_the_papers_preset_is_the_papers():
    config = LoRADAConfig.paper()
    assert (config.num_samples, config.batch_size, config.sample_selection) == (256, 1, "head")
    assert config.token_mask == "attention"
    assert config.input_damping == config.output_damping == 1e-6
    assert (config.bias_weight, config.variance_weight) == (1.0, 0.03)
    assert (config.step_size, config.stable_gamma) == (None, 1024.0)
    assert (config.factor_split, config.layer_steps) == ("orthonormal", "equal")
    assert not config.searches_step
    assert not config.freeze_a


def test_the_papers_preset_takes_overrides():
    config = LoRADAConfig.paper(num_samples=3, stable_gamma=16.0)
    assert (config.num_samples, config.stable_gamma, config.factor_split) == (3, 16.0, "orthonormal")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1."),
        ({"batch_size": 0}, "batch_size=0 must be at least 1."),
        ({"population_size": 0}, "population_size=0 must be at least 1."),
        ({"max_rank": -1}, "max_rank=-1 must be at least 1."),
        ({"search_samples": -1}, "search_samples=-1 must be finite and not negative."),
        ({"bias_weight": -1.0}, "bias_weight=-1.0 must be finite and not negative."),
        ({"variance_weight": math.inf}, "variance_weight=inf must be finite and not negative."),
        ({"variance_weight": math.nan}, "variance_weight=nan must be finite and not negative."),
        ({"seed": -1}, "seed=-1 must be between 0 and 2**32."),
        ({"seed": 2**32}, f"seed={2**32} must be between 0 and 2**32."),
        ({"stable_gamma": 0.0}, "stable_gamma=0.0 must be positive."),
        ({"step_size": 0.0}, "step_size=0.0 must be positive."),
        ({"step_size": -0.1}, "step_size=-0.1 must be positive."),
        ({"step_size": math.nan}, "step_size=nan must be positive."),
        ({"step_size": "auto"}, "step_size='auto': give a positive number, \"line_search\" or None."),
        ({"num_samples": 2.5}, "num_samples=2.5 must be int, not float."),
        ({"num_samples": "8"}, "num_samples='8' must be int, not str."),
        ({"num_samples": True}, "num_samples=True must be int, not bool."),
        ({"batch_size": 2.5}, "batch_size=2.5 must be int or None, not float."),
        ({"bias_weight": "1"}, "bias_weight='1' must be float, not str."),
        ({"freeze_a": 1}, "freeze_a=1 must be bool, not int."),
        ({"step_size": True}, "step_size=True must be float or str or None, not bool."),
        ({"token_mask": "prompt"}, "token_mask='prompt' is not one of 'attention', 'labels'."),
        ({"solver": "lobpcg"}, "solver='lobpcg' is not one of 'auto', 'eigh', 'krylov'."),
        ({"factor_split": None}, "factor_split=None is not one of 'default_norm', 'orthonormal', 'balanced'."),
        ({"statistics_save_steps": 0}, "statistics_save_steps=0 must be at least 1."),
        ({"schedule": "ranks"}, "schedule='ranks' is not one of 'auto', 'samples', 'layers'."),
        (
            {"memory_budget": "8 gigs"},
            'memory_budget=\'8 gigs\' is no amount of memory. Give bytes, or text such as "8GiB" or "500MB".',
        ),
        (
            {"memory_budget": 0},
            'memory_budget=0 is no amount of memory. Give bytes, or text such as "8GiB" or "500MB".',
        ),
        (
            {"save_statistics": True, "schedule": "layers"},
            'save_statistics needs the sums in one process: set schedule="samples" or leave it out.',
        ),
        ({"layer_steps": "loss"}, "layer_steps='loss' is not one of 'displacement', 'equal'."),
        ({"projected_rms": 0.0}, "projected_rms=0.0 must be positive."),
        (
            {"projected_rms": 0.3, "factor_split": "balanced"},
            "projected_rms=0.3 and factor_split='balanced' both say how long the rows of A are. Leave one of them out.",
        ),
        (
            {"search_samples": 0},
            'step_size="line_search" needs search_samples of at least 1, got 0. Raise it, or give a step_size.',
        ),
        (
            {"bias_weight": 0.0, "variance_weight": 0.0},
            "bias_weight and variance_weight are both 0: nothing is left to minimise. Raise one.",
        ),
    ],
)
def test_a_bad_setting_is_an_error_that_says_what_to_give(settings, message):
    with pytest.raises(ConfigError) as caught:
        LoRADAConfig(**settings)
    assert str(caught.value) == message


def test_without_a_line_search_no_search_samples_are_needed():
    assert LoRADAConfig(search_samples=0, step_size=0.1).search_samples == 0


def test_a_whole_number_will_do_where_a_real_one_is_asked_for():
    assert LoRADAConfig(variance_weight=1, step_size=1, input_damping=1).variance_weight == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1e-6, Damping(amount=1e-6)),
        (0, Damping(amount=0.0)),
        ("1e-6", Damping(amount=1e-6)),
        ("0.1*mean", Damping(amount=0.1, reference="mean")),
        (" 0.1 * median ", Damping(amount=0.1, reference="median")),
        ("0*mean", Damping(amount=0.0, reference="mean")),
    ],
)
def test_a_damping_is_read(text, expected):
    assert Damping.parse(text, "input_damping") == expected


@pytest.mark.parametrize(
    "text",
    [
        -1.0,
        math.nan,
        math.inf,
        "-0.1*mean",
        "mean",
        "0.1*max",
        "0.1*absolute",
        "0.1*",
        "*mean",
        "nan*mean",
        "",
        "0.1mean",
        True,
    ],
)
@pytest.mark.parametrize("name", ["input_damping", "output_damping"])
def test_what_is_no_damping_is_an_error(text, name):
    with pytest.raises(ConfigError) as caught:
        LoRADAConfig(**{name: text})
    message = str(caught.value)
    assert message.startswith(f"{name}={text!r} ")
    if text is not True:
        assert '"0.1*mean" or "0.1*median"' in message


@given(
    num_samples=st.integers(1, 10**6),
    variance_weight=st.floats(0, 1e6),
    input_damping=st.one_of(st.floats(0, 1e6), st.just("0.5*median")),
    step_size=st.one_of(st.none(), st.just("line_search"), st.floats(1e-9, 1e3)),
    solver=st.sampled_from(["auto", "eigh", "krylov"]),
)
def test_settings_survive_json(**settings):
    config = LoRADAConfig(**settings)
    assert LoRADAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_another_version_are_an_error():
    with pytest.raises(ConfigError, match=r"Unknown settings \['beta', 'zeta'\]. This version of lora_da_hf"):
        LoRADAConfig.from_dict({"zeta": 1, "num_samples": 2, "beta": 3})


def test_stored_settings_are_checked_too():
    with pytest.raises(ConfigError, match="num_samples=0"):
        LoRADAConfig.from_dict({"num_samples": 0})


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRADAConfig().num_samples = 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1024, 1024),
        (2.0**40, 2**40),
        ("5e9", 5 * 10**9),
        ("8GiB", 2**33),
        ("8 GB", 8 * 10**9),
        ("1.5KiB", 1536),
        ("500MB", 500 * 10**6),
        ("2TiB", 2**41),
        ("7B", 7),
    ],
)
def test_amounts_of_memory_are_read(text, size):
    assert parse_bytes(text) == size
    assert LoRADAConfig(memory_budget=text).memory_budget == text


@pytest.mark.parametrize("text", ["", "GiB", "8iB", "-1", "8gib", "nan", "inf", "1e999", "0.5", "1..5", "8 GiB left"])
def test_what_is_no_amount_of_memory_is_an_error(text):
    with pytest.raises(ConfigError, match="is no amount of memory"):
        LoRADAConfig(memory_budget=text)
