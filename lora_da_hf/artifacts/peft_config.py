"""PEFT's configuration in the folder of a stored initialisation: ranks and alphas by layer."""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from lora_da_hf.errors import ArtifactError


def read_peft_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is, with what PEFT adds to it in other versions.

    Raises:
        ArtifactError: if it is no configuration of a LoRA adapter.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        patterns = (values["rank_pattern"], values["alpha_pattern"])
        numbers = [values["r"], values["lora_alpha"], *(n for pattern in patterns for n in pattern.values())]
        for key in (key for pattern in patterns for key in pattern):
            re.compile(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ArtifactError(f"{path} is no configuration of a LoRA adapter ({error!r}). Fetch it again.") from error
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
        raise ArtifactError(f"{path}: a rank or an alpha is not positive. Fetch it again.")
    return values


def rank_of(peft_config: Mapping[str, Any], name: str) -> int:
    """Return the rank that PEFT gives a layer."""
    pattern = peft_config["rank_pattern"]
    return pattern.get(get_pattern_key(pattern.keys(), name), peft_config["r"])


def alpha_of(peft_config: Mapping[str, Any], name: str) -> float:
    """Return the alpha that PEFT gives a layer."""
    pattern = peft_config["alpha_pattern"]
    return pattern.get(get_pattern_key(pattern.keys(), name), peft_config["lora_alpha"])


def alpha_divisor(peft_config: Mapping[str, Any], rank: int) -> float:
    """Return what PEFT divides alpha by to scale a layer of this rank."""
    return math.sqrt(rank) if peft_config.get("use_rslora") else rank


def with_ranks(
    peft_config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], kept: Mapping[str, str]
) -> dict[str, Any]:
    """Return the configuration for other ranks and alphas, with each layer that differs from the default by its name.

    Patterns of the user are written out by layer, since PEFT takes the first that matches and sorts them when it saves.

    Args:
        peft_config: What to start from.
        ranks: By layer.
        alphas: By layer.
        kept: Further layers, which keep the rank and alpha that they have.
    """
    ranks = {**{name: rank_of(peft_config, name) for name in kept}, **ranks}
    alphas = {**{name: alpha_of(peft_config, name) for name in kept}, **alphas}
    default_rank = collections.Counter(rank for name, rank in ranks.items() if name not in kept).most_common(1)[0][0]
    default_alpha = peft_config["lora_alpha"]
    return {
        **peft_config,
        "r": default_rank,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != default_rank},
        "alpha_pattern": {_exactly(name): alpha for name, alpha in alphas.items() if alpha != default_alpha},
    }


def _exactly(name: str) -> str:
    """Return the pattern that PEFT matches with this layer alone."""
    return "^" + re.escape(name)
