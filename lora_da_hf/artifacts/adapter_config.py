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
from lora_da_hf.report import LayerReport

PEFT_PREFIX = "base_model.model."
INIT_LORA_WEIGHTS = (True, "gaussian", "eva")
"""How PEFT may have made a fresh adapter whose B is zero and whose base is untouched."""

_MAX_BYTES = 4 << 20
_MOST_PARAMETERS = 16
"""Of one module. Experts have two or four, and a file from outside could name 100,000."""
_EXPERT = re.compile(r"\[(\d+)\]$")
_MORE_THAN_NAMES = ("exclude_modules", "layers_pattern", "layers_to_transform")
_NOT_STORED = (*_MORE_THAN_NAMES, "init_lora_weights", "eva_config", "runtime_config", "auto_mapping")
_Names = list[Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=512)]]
_FewNames = Annotated[_Names, Field(max_length=64)]
_Rank = Annotated[int, Field(ge=1, lt=2**31)]
_Alpha = Annotated[float, Field(gt=0)]


class _Config(BaseModel):
    """The settings that are written. Any other must have PEFT's default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, str_max_length=4096)
    peft_type: Literal["LORA"]
    peft_version: str | None = None
    task_type: (
        Literal["CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"] | None
    ) = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Alpha] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool | None = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: _Names | None = None
    target_parameters: Annotated[_Names, Field(max_length=1024)] | None = None
    modules_to_save: _FewNames | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False


# ---- names


def holder_of(name: str) -> str:
    """Return the name under which PEFT stores a layer, without the number of an expert."""
    return _EXPERT.sub("", name)


def expert_of(name: str) -> int | None:
    """Return the number of the expert whose name it is, if it is one."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def is_saved(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether PEFT trains a module in full: its name ends with one to save, at a dot or not, or lies in one."""
    saved: Collection[str] = config["modules_to_save"] or ()
    return any(name.endswith(part) or f".{part}." in f".{name}." for part in saved)


def _ends_of(name: str) -> Iterator[str]:
    """Yield a name, and each end of it behind a dot, by which ``target_modules`` may call it."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _exactly(name: str) -> str:
    """Return the pattern that matches this layer alone."""
    return "^" + re.escape(name)


def _pattern_names(config: Mapping[str, Any], layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each adapted layer with what PEFT looks its rank up by: its name, or those of experts' parameters."""
    targets: set[str] = set(config["target_modules"] or ())
    parameters: dict[str, list[str]] = {}
    for target in config["target_parameters"] or ():
        parent, _, parameter = target.rpartition(".")
        parameters.setdefault(parent, []).append(parameter)
    for name in layers:
        if any(end in targets for end in _ends_of(name)):
            yield name, name
        else:
            module = holder_of(name).replace(".base_layer", "")
            every = (f"{module}.{last}" for end in (*_ends_of(module), "") for last in parameters.get(end, ()))
            yield from ((name, key) for key in itertools.islice(every, _MOST_PARAMETERS))


# ---- the configuration


def alpha_divisor(config: Mapping[str, Any], rank: int) -> float:
    """Return what PEFT divides alpha by to scale a layer of this rank."""
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _with_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """Return the configuration for other ranks, at one scaling of all layers.

    `r` is the largest rank, so that ``lora_alpha`` and `r` alone tell the scaling to those who read no patterns.
    """

    def alpha_for(rank: int) -> float:  # an integer, as PEFT has it, but for rounding
        alpha = scaling * alpha_divisor(config, rank)
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    largest = max(ranks.values(), default=config["r"])
    smaller = {_exactly(name): rank for name, rank in ranks.items() if rank != largest}
    alphas = {key: alpha_for(rank) for key, rank in smaller.items()}
    of_all = {"r": largest, "lora_alpha": alpha_for(largest)}
    return {**config, **of_all, "rank_pattern": smaller, "alpha_pattern": alphas}


def config_for(config: Mapping[str, Any], layers: Mapping[str, LayerReport], kept: Iterable[str]) -> dict[str, Any]:
    """Return a stored configuration at the ranks and the scaling of these layers.

    Experts, and layers that were ``kept`` as PEFT made them, have the rank that it gives them.
    """
    found, usual = config["rank_pattern"], config["r"]
    ranks = {key: found.get(_exactly(key), usual) for _, key in _pattern_names(config, (*layers, *kept))}
    ranks |= {name: layer.rank for name, layer in layers.items() if name in ranks}
    return _with_ranks(config, ranks, next(iter(layers.values())).peft_scaling)


def config_to_store(
    saved: Mapping[str, Any], base: BaseModelFacts, modules: Collection[str], ranks: Mapping[str, int], scaling: float
) -> dict[str, Any]:
    """Return what is stored of a configuration that PEFT ``saved``, with the modules that it adapts by name."""
    stored = {key: value for key, value in saved.items() if key in _Config.model_fields}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in stored.items()}
    targets: Any = config.get("target_modules")
    is_plain = not isinstance(targets, str) and all(saved.get(key) in (None, [], "") for key in _MORE_THAN_NAMES)
    found = {end for name in modules for end in _ends_of(name.replace(".base_layer", ""))}
    config["target_modules"] = targets and (sorted(found & set(targets)) if is_plain else sorted(modules))
    config["revision"] = base.revision
    if base.name_or_path:  # which the manifest marks where it is a folder's
        config["base_model_name_or_path"] = base.name_or_path.removeprefix("./")
    return _with_ranks(config, ranks, scaling)


def refuse_unstorable(config: LoraConfig) -> None:
    """Refuse settings of PEFT whose adapter could be written, and then not be read by `check_adapter_config`."""
    values, defaults, kept = config.to_dict(), type(config)().to_dict(), (*_Config.model_fields, *_NOT_STORED)
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
        config, defaults = read.model_dump(include=set(_Config.model_fields)), LoraConfig().to_dict()
        for key, value in (read.model_extra or {}).items():
            if key not in defaults or json.dumps(value) != json.dumps(defaults[key]):
                raise ValueError(f"{key[:80]} is {str(value)[:80]}, and only PEFT's default is stored")
        for key, expected in _as_written(config, manifest).items():
            if not _same(config[key], expected):
                raise ValueError(f"{key} is {str(config[key])[:160]}, and by the manifest {str(expected)[:160]}")
    except ValueError as error:
        raise ArtifactError(f"{path}: {explained(error)}. Do not use it.") from error
    return config


def _as_written(config: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Return a configuration as it is written for the layers and the base of a manifest."""
    layers, base, targets = (*manifest.layers, *manifest.report.kept), manifest.base_model, config["target_modules"]
    adapted, first = {name for name, _ in _pattern_names(config, manifest.layers)}, manifest.report.layers[0]
    for name, layer in manifest.layers.items():
        if name not in adapted or is_saved(config, name):
            raise ValueError(f"target_modules leaves out {name}, or modules_to_save takes it")
        if not math.isclose(layer.peft_scaling, first.peft_scaling, rel_tol=1e-9):
            raise ValueError(f"the manifest gives {name} another scaling than {first.name}")
    name = base.name_or_path or config["base_model_name_or_path"]
    unknown = set(targets or ()).difference(*map(_ends_of, (*layers, *(config["modules_to_save"] or ()))))
    return {
        **config_for(config, manifest.layers, manifest.report.kept),
        "target_modules": targets and [target for target in targets if target not in unknown],
        "revision": base.revision,
        "base_model_name_or_path": name and name.removeprefix("./"),
    }


def _same(found: Any, expected: Any) -> bool:
    """Compare two values of a configuration, of which alphas are computed."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    return math.isclose(found, expected, rel_tol=1e-9) if isinstance(found, float) else found == expected
