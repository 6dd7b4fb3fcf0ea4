"""The tensors of an adapter besides the factors that were initialised: all must be what PEFT starts with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.peft_config import expert_of, holder_of, is_parameter, is_saved, rank_of
from lora_da_hf.errors import ArtifactError

MAGNITUDE = ".lora_magnitude_vector"
DELTA = ".token_adapter.trainable_tokens_delta"
_BIAS_OF_B = ".lora_B.bias"
_FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_B", ".lora_embedding_A"))
"""Which factors there are, the one that PEFT starts at zero last."""


def check_other_tensors(
    path: Path, tensors: Mapping[str, Tensor], known: Collection[str], config: Mapping[str, Any], manifest: Manifest
) -> None:
    """Verify that an adapter's other tensors are ones that its config names, and change nothing where that shows.

    PEFT loads by name whatever it finds: a tensor with the name of a base weight would replace that weight. What only
    the base model tells, `lora_da_hf.pipeline.against_base` compares.

    Args:
        path: The adapter's file, for messages.
        tensors: Its tensors, finite ones.
        known: Those that were checked already.
        config: The checked adapter config.
        manifest: Of the folder.

    Raises:
        ArtifactError: naming the tensor.
    """
    kept = {holder_of(name) for name in manifest.report.kept}
    holders = {*map(holder_of, manifest.layers), *kept}
    others = sorted(set(tensors) - set(known))
    named = {
        key
        for key in others
        if key.startswith(PEFT_PREFIX) and _is_named(key.removeprefix(PEFT_PREFIX), holders, kept, config)
    }
    for key in others:
        name = key.removeprefix(PEFT_PREFIX)
        if key not in named and not _is_tied(key, tensors, named, config):
            raise ArtifactError(f"{path}: {key!r} is no tensor of this adapter. Do not use it.")
        if name.endswith(_BIAS_OF_B) and tensors[key].any():
            raise ArtifactError(f"{path}: {key!r} is not zero, as it is before training. Do not use it.")
        if name.endswith(MAGNITUDE) and not (tensors[key] > 0).all():
            raise ArtifactError(f"{path}: {key!r} is not positive. Do not use it.")
        if name.endswith(DELTA) and tensors[key].dim() != 2:
            raise ArtifactError(f"{path}: {key!r} is no matrix. Do not use it.")
        if name.endswith(DELTA) and len(tensors[key]) != len(trained_tokens(config, name.removesuffix(DELTA))):
            raise ArtifactError(f"{path}: {key!r} is of other tokens than the config says. Do not use it.")
    for name in manifest.report.kept:
        _check_kept(path, tensors, name, config, manifest)


def _is_named(name: str, holders: Collection[str], kept: Collection[str], config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor belongs to an adapted layer, or to what the config says is trained besides."""
    factors = [end for pair in _FACTORS for end in pair]
    if any(name.endswith(end) and name.removesuffix(end) in kept for end in factors):
        return True
    ends = [MAGNITUDE] if config.get("use_dora") else []
    ends += [_BIAS_OF_B] if config.get("lora_bias") else []
    if any(name.endswith(end) and name.removesuffix(end) in holders for end in ends):
        return True
    if ".lora_" in name:
        return False
    if name.endswith(DELTA):
        return bool(trained_tokens(config, name.removesuffix(DELTA)))
    module, _, parameter = name.rpartition(".")
    if parameter == "bias" and (config.get("bias") or "none") != "none":
        return True
    return is_saved(config, module)


def _is_tied(key: str, tensors: Mapping[str, Tensor], named: Collection[str], config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor is a saved one under another name: of tied weights PEFT names one and stores both."""
    if not config.get("ensure_weight_tying") or not key.startswith(PEFT_PREFIX) or ".lora_" in key:
        return False
    return any(tensors[key].equal(tensors[other]) for other in named if ".lora_" not in other)


def trained_tokens(config: Mapping[str, Any], module: str) -> list[int]:
    """Return the tokens whose rows are trained in a module.

    Args:
        config: PEFT's.
        module: Its name.
    """
    tokens: Any = config.get("trainable_token_indices") or []
    if isinstance(tokens, Mapping):
        named: Mapping[str, list[int]] = tokens
        return next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), [])
    return tokens


def _check_kept(
    path: Path, tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any], manifest: Manifest
) -> None:
    """Verify that an adapter that PEFT initialised maps everything to zero, and that its factors fit together."""
    holder = holder_of(name)
    for random_end, zero_end in _FACTORS:
        first, second = (tensors.get(f"{PEFT_PREFIX}{holder}{end}") for end in (random_end, zero_end))
        if first is None and second is None:
            continue
        if first is None or second is None or min(first.dim(), second.dim()) < 2:
            raise ArtifactError(f"{path}: a factor of {name} is missing or no matrix. Fetch it again.")
        lora_A, lora_B = (first, second) if zero_end.endswith(".weight") else (second, first)
        fits = lora_A.dim() > 2 or lora_A.shape[0] == lora_B.shape[1]  # a grouped convolution has other shapes
        if not is_parameter(config, name):
            fits = fits and lora_A.shape[0] == rank_of(config, name)
        if not fits:
            raise ArtifactError(
                f"{path}: the factors of {name} are {list(lora_A.shape)} and {list(lora_B.shape)}, which do not make "
                "an adapter of its rank. Fetch it again."
            )
        ranks = {layer.rank for other, layer in manifest.layers.items() if holder_of(other) == holder}
        if holder != name and ranks:  # the other experts have their columns in the same tensor
            second = second[:, expert_of(name) :: max(second.shape[1] // ranks.pop(), 1)]
        if second.any():
            raise ArtifactError(f"{path}: the adapter of {name}, which PEFT initialised, is not zero. Do not use it.")
