"""Fingerprints of base models: equal for the same weights in float32 and in bfloat16."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor

_SAMPLED_ENTRIES = 1024
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
)


def config_facts(config: Any) -> dict[str, Any]:
    """Return the facts of a model config that two copies of a base must agree on."""
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config() if callable(get_text_config) else config
    facts = {key: getattr(text, key, None) for key in _CONFIG_KEYS}
    return {key: value for key, value in facts.items() if isinstance(value, (int, float, str))}


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Hash 1,024 entries of each weight (or all), rounded to bfloat16, so that a bfloat16 copy has the same.

    Returns:
        A SHA-256, or None if a weight is quantised, so that its entries are not those of the original.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        data = weight.detach()
        if not data.is_floating_point() or type(weight).__name__ not in ("Parameter", "Tensor"):
            return None
        flat = data.reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_ENTRIES)
        # a copy: memory that numpy has looked into cannot be released, as FSDP2 does
        entries = flat[::step][:_SAMPLED_ENTRIES].to("cpu", torch.bfloat16, copy=True).contiguous()
        digest.update(f"{name}:{list(weight.shape)}:".encode())
        digest.update(entries.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Describe the facts that both sides have and disagree on."""
    return [
        f"{key} is {found[key]!r} and was {expected[key]!r}"
        for key in expected
        if key in found and expected[key] is not None and found[key] is not None and found[key] != expected[key]
    ]


def is_repo_id(name: str) -> bool:
    """Tell whether the Hub allows this name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
