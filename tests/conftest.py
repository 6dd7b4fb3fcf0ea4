"""Small models and samples that all tests share. Every fixture is a factory, so a test may make several."""

import random

import pytest
import torch
from harness import STORED_RANK, make_learnable_samples, store_init
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


def make_tiny_llama(*, seed=0, dtype=torch.float32, **overrides):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(dtype)


def make_token_samples(count, *, seed=0, min_length=5, max_length=14, vocabulary=VOCABULARY):
    """Make token lists of different lengths, with a prompt of a different length each masked out of the labels."""
    generator = random.Random(seed)
    samples = []
    for _ in range(count):
        length = generator.randint(min_length, max_length)
        ids = [generator.randrange(3, vocabulary) for _ in range(length)]
        prompt = generator.randint(1, length - 2)
        samples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def make_lora_model(*, model=None, seed=0, autocast_adapter_dtype=True, **lora):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    model = make_tiny_llama(seed=seed) if model is None else model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**{**settings, **lora}), autocast_adapter_dtype=autocast_adapter_dtype)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Let a row of docs/support.md fail if it is skipped or fails as expected, since the page says that it passes."""
    report = yield
    if report.skipped and item.get_closest_marker("support") is not None:
        report.outcome = "failed"
        report.longrepr = f"a row of docs/support.md was not run to its end: {report.longrepr}"
        vars(report).pop("wasxfail", None)
    return report


@pytest.fixture
def tiny_llama():
    """Return ``tiny_llama(*, seed=0, dtype=float32, **LlamaConfig fields)``, a fresh and seeded model."""
    return make_tiny_llama


@pytest.fixture
def token_samples():
    """Return ``token_samples(count, *, seed=0, min_length=5, max_length=14)``."""
    return make_token_samples


@pytest.fixture
def samples():
    """Return 24 samples that can be learned."""
    return make_learnable_samples(24)


@pytest.fixture
def lora_model():
    """Return ``lora_model(*, model=None, seed=0, **LoraConfig fields)``: a fresh tiny Llama with a fresh adapter."""
    return make_lora_model


@pytest.fixture(scope="session")
def stored_init(tmp_path_factory):
    """Return a folder with an initialisation of a tiny Llama: rank 8, stored up to 16, with statistics. Read only."""
    folder = tmp_path_factory.mktemp("stored") / "init"
    return store_init(folder, make_lora_model(r=STORED_RANK))
