"""PEFT's configuration of a stored adapter: what is written of it, and the allow-list by which it is read.

It gives layers, ranks and alphas by name. PEFT takes regular expressions there too, and one can be written that takes
for ever to match.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field

from lora_da_hf.artifacts.manifest import BaseModelFacts, Manifest, explained
from lora_da_hf.errors import ArtifactError, UnsupportedSetupError

PEFT_PREFIX = "base_model.model."
INIT_LORA_WEIGHTS = (True, "gaussian", "eva")
"""How PEFT may have made a fresh adapter whose B is zero and whose base is untouched."""

_MAX_BYTES = 4 << 20
_MOST_PARAMETERS = 16
"""Of one module. Experts have two or four, and a file from outside could name 100,000."""
_EXPERT = re.compile(r"\[(\d+)\]$")
_MORE_THAN_NAMES = ("exclude_modules", "layers_pattern", "layers_to_transform")
_TEXT = Annotated[str, Field(max_length=4096)]
_NAMES = Annotated[
    list[Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=512)]], Field(max_length=100_000)
]
_FEW_NAMES = Annotated[_NAMES, Field(max_length=64)]
_RANK = Annotated[int, Field(ge=1, lt=2**31)]
_TOKENS = Annotated[list[int], Field(max_length=500_000)]


class _Config(BaseModel):
    """The settings that are written. Any other must have PEFT's default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    peft_type: Literal["LORA"]
    peft_version: _TEXT | None = None
    task_type: (
        Literal["CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"] | None
    ) = None
    base_model_name_or_path: _TEXT | None = None
    revision: _TEXT | None = None
    inference_mode: bool = False
    r: _RANK
    lora_alpha: Annotated[float, Field(gt=0)]
    rank_pattern: Annotated[dict[_TEXT, _RANK], Field(max_length=100_000)] = {}
    alpha_pattern: Annotated[dict[_TEXT, Annotated[float, Field(gt=0)]], Field(max_length=100_000)] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: _NAMES | None = None
    target_parameters: Annotated[_NAMES, Field(max_length=1024)] | None = None
    modules_to_save: _FEW_NAMES | None = None
    trainable_token_indices: _TOKENS | Annotated[dict[_TEXT, _TOKENS], Field(max_length=64)] | None = None
    ensure_weight_tying: bool = False


def holder_of(name: str) -> str:
    """Return the name under which PEFT stores a layer, without the number of an expert."""
    return _EXPERT.sub("", name)


def expert_of(name: str) -> int | None:
    """Return the number of the expert whose name it is, if it is one."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def is_saved(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether PEFT trains a module in full: its name ends with one to save, at a dot or not, or lies in one."""
    saved: Collection[str] = config.get("modules_to_save") or ()
    return any(name.endswith(part) or f".{part}." in f".{name}." for part in saved)


def pattern_names(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, list[str]]:
    """Return what PEFT may look up the rank of each layer by: its name, or those of its experts' parameters."""
    targets: set[str] = set(config.get("target_modules") or ())
    parameters: dict[str, list[str]] = {}
    for target in config.get("target_parameters") or ():
        parent, _, parameter = target.rpartition(".")
        parameters.setdefault(parent, []).append(parameter)
    found: dict[str, list[str]] = {}
    for name in layers:
        if any(end in targets for end in _ends_of(name)):
            found[name] = [name]
        else:
            module = holder_of(name).replace(".base_layer", "")
            every = (f"{module}.{last}" for end in (*_ends_of(module), "") for last in parameters.get(end, ()))
            found[name] = list(itertools.islice(every, _MOST_PARAMETERS))
    return found


def _ends_of(name: str) -> Iterator[str]:
    """Yield a name, and each end of it behind a dot, by which ``target_modules`` may call it."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _exactly(name: str) -> str:
    """Return the pattern that matches this layer alone."""
    return "^" + re.escape(name)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Return the rank that a stored configuration gives to a `pattern_names` name."""
    return (config.get("rank_pattern") or {}).get(_exactly(name), config["r"])


def alpha_divisor(config: Mapping[str, Any], rank: int) -> float:
    """Return what PEFT divides alpha by to scale a layer of this rank."""
    return math.sqrt(rank) if config.get("use_rslora") else rank


def with_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """Return the configuration for other ranks (by the names of `pattern_names`), at one scaling of all layers.

    `r` is the largest rank, so that ``lora_alpha`` and `r` alone tell the scaling to those who read no patterns.
    """

    def alpha_for(rank: int) -> float:  # an integer, as PEFT has it, but for rounding
        alpha = scaling * alpha_divisor(config, rank)
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    largest = max(ranks.values())
    smaller = {_exactly(name): rank for name, rank in ranks.items() if rank != largest}
    return {
        **config,
        "r": largest,
        "lora_alpha": alpha_for(largest),
        "rank_pattern": smaller,
        "alpha_pattern": {key: alpha_for(rank) for key, rank in smaller.items()},
    }


def config_to_store(
    saved: Mapping[str, Any], base: BaseModelFacts, modules: Collection[str], ranks: Mapping[str, int], scaling: float
) -> dict[str, Any]:
    """Return what is stored of a configuration that PEFT ``saved``, with the modules that it adapts by name."""
    config = {key: value for key, value in saved.items() if key in _Config.model_fields}
    targets: Any = config.get("target_modules")
    is_plain = not isinstance(targets, str) and all(saved.get(key) in (None, [], "") for key in _MORE_THAN_NAMES)
    found = {end for name in modules for end in _ends_of(name.replace(".base_layer", ""))}
    config["target_modules"] = targets and (sorted(found & set(targets)) if is_plain else sorted(modules))
    config["revision"] = base.revision
    if base.name_or_path:  # which the manifest marks where it is a folder's
        config["base_model_name_or_path"] = base.name_or_path.removeprefix("./")
    return with_ranks(config, ranks, scaling)


def refuse_unstorable(config: LoraConfig) -> None:
    """Refuse settings of PEFT whose adapter could be written, and then not be read by `check_adapter_config`."""
    kept = {
        *_Config.model_fields,
        *_MORE_THAN_NAMES,
        "init_lora_weights",
        "eva_config",
        "runtime_config",
        "auto_mapping",
    }
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    used = sorted(key for key, value in values.items() if key not in kept and value != defaults.get(key))
    if used or config.init_lora_weights not in INIT_LORA_WEIGHTS:
        raise UnsupportedSetupError(
            f"The adapter's config sets {', '.join(used) or 'init_lora_weights'}, which is not stored. Make the "
            "adapter without it, or call initialize_lora_da without output_dir."
        )


def check_adapter_config(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Read ``adapter_config.json``: each key is one that is written, as the manifest has it, or has PEFT's default."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        read = _Config.model_validate_json(path.read_bytes())
        defaults = LoraConfig().to_dict()
        for key, value in (read.model_extra or {}).items():
            if key not in defaults or json.dumps(value) != json.dumps(defaults[key]):
                raise ValueError(f"{key[:80]} is {str(value)[:80]}, and only PEFT's default is stored")
        config = read.model_dump()
        _compare(config, manifest)
    except ValueError as error:
        raise ArtifactError(f"{path}: {explained(error)}. Do not use it.") from error
    return config


def _compare(config: dict[str, Any], manifest: Manifest) -> None:
    """Raise a ValueError where a configuration is not as the manifest has it."""
    base, name = manifest.base_model, config["base_model_name_or_path"]
    if name and base.name_or_path and name.removeprefix("./") != base.name_or_path.removeprefix("./"):
        raise ValueError(f"base_model_name_or_path is {name!r}, and the manifest says {base.name_or_path!r}")
    if config["revision"] != base.revision:
        raise ValueError(f"revision is {config['revision']!r}, and the manifest says {base.revision!r}")
    layers, kept = manifest.layers, manifest.report.kept
    targets: set[str] = set(config["target_modules"] or ())
    unused = targets.difference(*map(_ends_of, (*layers, *kept, *(config["modules_to_save"] or ()))))
    if unused:
        raise ValueError(f"target_modules has {min(unused)!r}, and the manifest no layer of that name")
    names = pattern_names(config, (*layers, *kept))
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    unknown = {*ranks, *alphas} - {_exactly(name) for found in names.values() for name in found}
    if unknown:
        raise ValueError(f"rank_pattern or alpha_pattern has {min(unknown)[:80]!r}, which is not the name of a layer")
    for name, layer in layers.items():
        found = {key: rank_of(config, key) for key in names[name]}
        if layer.rank not in found.values():
            raise ValueError(f"r or rank_pattern give {name} {[*found.values()] or 'no rank'}, and not {layer.rank}")
        for key, rank in found.items():
            scaling = alphas.get(_exactly(key), config["lora_alpha"]) / alpha_divisor(config, rank)
            if not math.isclose(layer.peft_scaling, scaling, rel_tol=1e-9):
                raise ValueError(f"lora_alpha gives {name} the scaling {scaling:.6g}, and not {layer.peft_scaling:.6g}")
        if is_saved(config, name):
            raise ValueError(f"modules_to_save takes {name}, which the manifest says is adapted")
