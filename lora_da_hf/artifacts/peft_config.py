"""Layers, ranks and alphas by name in PEFT's configuration; `adapter_config` checks the whole of a stored one.

PEFT takes regular expressions in many places. None from outside is ever run, since one can be written that takes for
ever: what is stored says it in names, which are compared.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_da_hf.errors import ArtifactError

_EXPERT = re.compile(r"\[\d+\]$")
_NAME = re.compile(r"\w[\w-]*|\^(\w|\\[.-])+")
"""A key of a pattern: the last part of names, or `_exactly` one name."""
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_CLASS = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TRANSFORMERS = re.compile(r"transformers(\.[A-Za-z_]\w*)*", re.ASCII)
_MORE_THAN_NAMES = ("exclude_modules", "layers_pattern", "layers_to_transform")


def holder_of(name: str) -> str:
    """Return the name under which PEFT stores a layer: an expert's factors lie in those of all experts."""
    return _EXPERT.sub("", name)


def expert_of(name: str) -> int:
    """Return the number of the expert whose name it is."""
    return int(name.removeprefix(holder_of(name))[1:-1])


def read_of_checkpoint(path: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of a training's checkpoint, with what PEFT adds to it in other versions.

    That of a stored initialisation is read by `lora_da_hf.artifacts.adapter_config.check_adapter_config`.

    Raises:
        ArtifactError: if it is not the configuration of a LoRA adapter.
    """
    remedy = "Go on from another checkpoint"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        patterns = (values["rank_pattern"], values["alpha_pattern"])
        numbers = [values["r"], values["lora_alpha"], *(n for pattern in patterns for n in pattern.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not the configuration of a LoRA adapter ({error!r}). {remedy}.") from error
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
        raise ArtifactError(f"{path}: a rank or an alpha is not positive. {remedy}.")
    return values


def check_names(path: Path, peft_config: Mapping[str, Any]) -> None:
    """Verify that layers, ranks and alphas are given by names, and nothing by a regular expression.

    Args:
        path: Of the file, for messages.
        peft_config: Its values, of the types that PEFT has.

    Raises:
        ArtifactError: naming the setting that is more than a name.
    """
    check_patterns(path, peft_config)
    odd: list[tuple[str, Any]] = [
        ("modules_to_save", name) for name in peft_config.get("modules_to_save") or () if not _PATH.fullmatch(name)
    ]
    odd += [(what, peft_config[what]) for what in _MORE_THAN_NAMES if peft_config.get(what) not in (None, [], "")]
    if isinstance(peft_config.get("target_modules"), str):
        odd.append(("target_modules", peft_config["target_modules"]))
    _refuse(path, odd)


def check_patterns(path: Path, peft_config: Mapping[str, Any]) -> None:
    """Do what `check_names` does for ranks and alphas alone."""
    patterns = ("rank_pattern", "alpha_pattern")
    _refuse(path, [(what, key) for what in patterns for key in peft_config.get(what) or () if not _NAME.fullmatch(key)])


def _refuse(path: Path, odd: list[tuple[str, Any]]) -> None:
    for what, value in odd:
        raise ArtifactError(
            f"{path}: {what} holds {str(value)[:80]!r}, where a stored initialisation has names of modules. Do not use "
            "it."
        )


def names_of_transformers(auto_mapping: Mapping[str, Any] | None) -> bool:
    """Tell whether ``auto_mapping``, whose module PEFT may import, is empty or names a class of transformers."""
    patterns = {"base_model_class": _CLASS, "parent_library": _TRANSFORMERS}
    found = {key: str(name) for key, name in (auto_mapping or {}).items() if name}
    return all(key in patterns and patterns[key].fullmatch(name) for key, name in found.items())


def is_target(peft_config: Mapping[str, Any], targets: Collection[str], name: str) -> bool:
    """Tell whether PEFT adapts a module: if its name, or the end of it behind a dot, is a target's.

    Args:
        peft_config: Checked by `check_names`.
        targets: Its ``target_modules``, as a set.
        name: Of the module.
    """
    if is_saved(peft_config, name):
        return False
    return any(end in targets for end in _ends_of(name))


def is_saved(peft_config: Mapping[str, Any], name: str) -> bool:
    """Tell whether PEFT trains a module in full: if its name ends with one to save, at a dot or not, or lies in one."""
    saved: list[str] = peft_config.get("modules_to_save") or []
    return any(name.endswith(part) or f".{part}." in f".{name}." for part in saved)


def targets_among(targets: Collection[str], names: Collection[str]) -> list[str]:
    """Return the targets that are the name of one of these modules, or the end of it behind a dot."""
    ends = {end for name in names for end in _ends_of(name.replace(".base_layer", ""))}
    return [target for target in targets if target in ends]


def _ends_of(name: str) -> list[str]:
    return [name[start:] for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))]


def in_names(
    peft_config: Mapping[str, Any], modules: Collection[str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Return the configuration with names in the place of what only PEFT's own matching reads, if there is any.

    Targets that no module has are left out, and so is a class of the base that is not one of transformers.

    Args:
        peft_config: What PEFT saved.
        modules: Those that it adapted.
        ranks: By the name of each module, and of each parameter that it adapted.
        alphas: By the same names.
    """
    if not names_of_transformers(peft_config.get("auto_mapping")):
        peft_config = {**peft_config, "auto_mapping": None}
    patterns = (*(peft_config.get("rank_pattern") or ()), *(peft_config.get("alpha_pattern") or ()))
    is_plain = not isinstance(peft_config.get("target_modules"), str) and all(map(_NAME.fullmatch, patterns))
    if is_plain and not any(peft_config.get(key) not in (None, [], "") for key in _MORE_THAN_NAMES):
        targets: list[str] | None = peft_config.get("target_modules")
        return {**peft_config, "target_modules": targets and targets_among(targets, modules)}
    return {
        **peft_config,
        **{key: None for key in _MORE_THAN_NAMES if key in peft_config},
        "target_modules": sorted(modules),
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != peft_config["r"]},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != peft_config["lora_alpha"]},
    }


def rank_of(peft_config: Mapping[str, Any], name: str) -> int:
    """Return the rank that PEFT gives a layer."""
    return _value(peft_config.get("rank_pattern"), name, peft_config.get("r"))


def alpha_of(peft_config: Mapping[str, Any], name: str) -> float:
    """Return the alpha that PEFT gives a layer."""
    return _value(peft_config.get("alpha_pattern"), name, peft_config.get("lora_alpha"))


def _value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return what PEFT finds in a pattern: the first key that is the last part of the name, or exactly the name."""
    found = {key for key in (name.rpartition(".")[2], _exactly(name)) if pattern and key in pattern}
    return next((value for key, value in pattern.items() if key in found), default) if pattern and found else default


def alpha_divisor(peft_config: Mapping[str, Any], rank: int) -> float:
    """Return what PEFT divides alpha by to scale a layer of this rank."""
    return math.sqrt(rank) if peft_config.get("use_rslora") else rank


def with_ranks(
    peft_config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    kept: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    """Return the configuration for other ranks and alphas, with each layer that differs from the default by its name.

    Patterns of the user are written out by layer, since PEFT takes the first that matches and sorts them when it saves.
    Experts have the default rank, since it is parameters that PEFT names in patterns for them.

    Args:
        peft_config: What to start from.
        ranks: By layer; of experts all the same.
        alphas: By layer.
        kept: Rank and alpha of further layers, which keep them.
    """
    experts = [rank for name, rank in ranks.items() if holder_of(name) != name]
    default_rank = (experts or [collections.Counter(ranks.values()).most_common(1)[0][0]])[0]
    default_alpha = peft_config["lora_alpha"]
    ranks = {**{name: rank for name, (rank, _) in kept.items()}, **ranks}
    alphas = {**{name: alpha for name, (_, alpha) in kept.items()}, **alphas}
    return {
        **peft_config,
        "r": default_rank,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != default_rank},
        "alpha_pattern": {_exactly(name): alpha for name, alpha in alphas.items() if alpha != default_alpha},
    }


def is_parameter(peft_config: Mapping[str, Any], name: str) -> bool:
    """Tell whether a layer is an expert, or another module that PEFT adapts a parameter of (``target_parameters``)."""
    plain = f".{name.replace('.base_layer', '')}"
    parents = [target.rpartition(".")[0] for target in peft_config.get("target_parameters") or ()]
    if "" in parents and not is_target(peft_config, set(peft_config.get("target_modules") or ()), name):
        return True  # a parameter that is named without its module may be of any
    return holder_of(name) != name or any(plain.endswith(f".{parent}") for parent in parents if parent)


def _exactly(name: str) -> str:
    """Return the pattern that PEFT matches with this layer alone."""
    return "^" + re.escape(name)
