"""Fingerprints of base models: equal for the same weights in float32 and in bfloat16."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor

_SAMPLED_ENTRIES = 1024


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


def is_repo_id(name: str) -> bool:
    """Tell whether the Hub allows this name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
