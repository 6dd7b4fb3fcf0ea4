"""What of a stored adapter only its base model tells: DoRA's magnitudes, and what is trained in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_da_hf.adapters.write import dora_magnitude
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import ADAPTER_FILE
from lora_da_hf.artifacts.other_tensors import DELTA, MAGNITUDE, trained_tokens
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.errors import ArtifactError
from lora_da_hf.pipeline.base_model import base_modules, head_parameters

_NORM_TOLERANCE = 1e-2
_QUANTISED_NORM_TOLERANCE = 0.1
"""A quantised copy has rows of other norms."""
_WEIGHT_TOLERANCE = 2.0**-7
"""Relative: a rounding to bfloat16 on each side."""


def check_against_base(stored: StoredInit, model: nn.Module) -> tuple[str, ...]:
    """Verify that DoRA's magnitudes, modules to save, biases and rows of trained tokens are those of the base.

    A head that transformers draws anew each time that it loads the base cannot be compared.

    Args:
        stored: What `load_init` read with this base.
        model: The base, with or without an adapter.

    Returns:
        What could not be compared.

    Raises:
        ArtifactError: naming the tensor that the base has otherwise.
    """
    path = stored.folder / ADAPTER_FILE
    tensors = read_tensors(path, None)
    modules: dict[str, Any] = dict(base_modules(model))
    heads = head_parameters(model)
    notes: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if name.endswith(MAGNITUDE):
            layer = name.removesuffix(MAGNITUDE)
            expected = _magnitude(modules[layer], tensors, layer, stored) if layer in modules else None
            is_floating = expected is not None and _is_floating(modules[layer].weight)
            is_exact = is_floating and bool(stored.manifest.base_model.weights_sha256)
            tolerance = _NORM_TOLERANCE if is_exact else _QUANTISED_NORM_TOLERANCE
        elif ".lora_" in name:
            continue
        else:
            expected, tolerance = _weight(modules, name, stored.peft_config), _WEIGHT_TOLERANCE
            if expected is not None and (id(expected) in heads or not _is_floating(expected)):
                kind = "random" if id(expected) in heads else "quantised"
                notes.append(f"{name} was not compared with the base's, which is {kind}")
                continue
        if expected is None or expected.numel() != tensor.numel() or not _close(tensor, expected, tolerance):
            raise ArtifactError(f"{path}: {key!r} is not what follows from the base model. Do not use it.")
    return tuple(notes)


def _is_floating(weight: Tensor) -> bool:
    return weight.is_floating_point() and type(weight).__name__ in ("Parameter", "Tensor")


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    wide = expected.detach().to("cpu", torch.float64).reshape(-1)
    return torch.allclose(found.double().reshape(-1), wide, rtol=tolerance, atol=1e-6)


def _weight(modules: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Tensor | None:
    """Return the base's weight that a tensor stands for; None if it has none."""
    if name.endswith(DELTA):
        module = name.removesuffix(DELTA)
        rows = trained_tokens(config, module)
        weight = getattr(modules.get(module), "weight", None)
        return None if weight is None or max(rows) >= len(weight) else weight.detach()[rows]
    module, _, parameter = name.rpartition(".")
    return getattr(modules.get(module), parameter, None)


def _magnitude(module: Any, tensors: Mapping[str, Tensor], name: str, stored: StoredInit) -> Tensor:
    """Return DoRA's magnitude of a layer; the adapter of one that PEFT initialised is zero."""
    factors = [tensors.get(f"{PEFT_PREFIX}{name}.lora_{factor}.weight") for factor in ("A", "B")]
    lora_A, lora_B = factors
    if isinstance(module, nn.Embedding):
        return module.weight.norm(dim=0)
    if lora_A is None or lora_B is None or lora_A.dim() != 2:
        return module.weight.flatten(1).norm(dim=1)
    scaling = stored.manifest.layers[name].peft_scaling if name in stored.manifest.layers else 0.0
    device = module.weight.device
    return dora_magnitude(module, lora_A.float().to(device), lora_B.float().to(device), scaling)
