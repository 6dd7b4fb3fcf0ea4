"""The checks of an adapter's PEFT config: that it is a plain LoRA adapter, and the one that the manifest describes."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, get_type_hints

from peft import LoraConfig

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.peft_config import (
    alpha_divisor,
    alpha_of,
    check_names,
    holder_of,
    is_target,
    names_of_transformers,
    rank_of,
    targets_among,
)
from lora_da_hf.artifacts.strict_json import check_types, fits, malformed, parse_json, too_large
from lora_da_hf.errors import ArtifactError, UnsupportedSetupError

PEFT_PREFIX = "base_model.model."

INIT_LORA_WEIGHTS = (True, "gaussian", "eva")
"""How PEFT may have made a fresh adapter whose B is zero and whose base is untouched."""

_MAX_BYTES = 4 << 20
_EMPTY = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""What makes PEFT load other files or code, change the base, or compute something else than ``s B A x``."""


def check_adapter_config(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Verify ``adapter_config.json``: types, nothing that loads code, ranks and scalings as the manifest says.

    Args:
        path: The file, whose hash was compared already.
        manifest: Of its folder.

    Returns:
        Its values.

    Raises:
        ArtifactError: if PEFT would make another adapter of it than the manifest describes.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise too_large(str(path), path.stat().st_size, _MAX_BYTES)
    values = parse_json(path.read_bytes(), str(path))
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ArtifactError(f"{path} is not the config of a LoRA adapter. Fetch it again.")
    config: dict[str, Any] = values
    hints = _hints()
    unknown = sorted(key for key in set(config) - set(hints) if config[key])
    if unknown:
        raise ArtifactError(f"{path}: this version of PEFT does not know {unknown}. Install the one that wrote it.")
    check_types(config, hints, str(path))
    _check_plain(path, config)
    check_names(path, config)
    _check_numbers(path, config)
    _check_base(path, config, manifest)
    _check_layers(path, config, manifest)
    return config


def refuse_unstorable(config: LoraConfig | None) -> None:
    """Refuse settings of PEFT whose adapter could be written, and then not be read by `check_adapter_config`.

    Raises:
        UnsupportedSetupError: naming them.
    """
    used = [key for key in _EMPTY if getattr(config, key, None)]
    if used:
        raise UnsupportedSetupError(
            f"{used} of the adapter's config is not that of a plain LoRA adapter, so the initialisation could not be "
            "loaded again. Make the adapter without it, or call initialize_lora_da without output_dir."
        )


@functools.cache
def _hints() -> dict[str, Any]:
    return {**get_type_hints(LoraConfig), "init_lora_weights": bool | str, "lora_alpha": float}


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    used = [key for key in _EMPTY if config.get(key)]
    if used or config.get("init_lora_weights", True) not in INIT_LORA_WEIGHTS:
        raise ArtifactError(
            f"{path}: {used or 'init_lora_weights'} is not that of a plain LoRA adapter. Do not use it."
        )
    if not names_of_transformers(config.get("auto_mapping")):
        raise ArtifactError(
            f"{path}: auto_mapping is {str(config['auto_mapping'])[:160]}, from which PEFT would import other code "
            "than transformers. Do not use it; if it is your own, compute it again."
        )
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise ArtifactError(f"{path}: lora_dropout={config['lora_dropout']} is no probability. Fetch it again.")


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    if not fits(config.get("r"), int) or config["r"] < 1:
        raise malformed(f"{path}: r={config.get('r')!r} is no rank")
    numbers: dict[str, Any] = {"lora_alpha": config.get("lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{pattern}[{key!r}]": value for key, value in (config.get(pattern) or {}).items()}
    for what, value in numbers.items():
        if not fits(value, float):
            raise malformed(f"{path}: {what}={str(value)[:80]!r} is no number")


def _check_base(path: Path, config: dict[str, Any], manifest: Manifest) -> None:
    named, expected = config.get("base_model_name_or_path"), manifest.base_model.name_or_path
    if named and expected and named.removeprefix("./") != expected.removeprefix("./"):  # as of a folder in the manifest
        raise ArtifactError(f"{path} names the base {named!r} and the manifest {expected!r}. Do not use it.")


def _check_layers(path: Path, config: dict[str, Any], manifest: Manifest) -> None:
    targets = set(config.get("target_modules") or ())
    known = (*manifest.layers, *manifest.report.kept, *(config.get("modules_to_save") or ()))
    unknown = sorted(targets - set(targets_among(targets, known)))
    if unknown:
        raise ArtifactError(
            f"{path}: target_modules holds {unknown[0]!r}, and the manifest no layer of that name. Do not use it."
        )
    for name, layer in manifest.layers.items():
        keys = _pattern_keys(config, name)
        ranks, alphas = [rank_of(config, key) for key in keys], [alpha_of(config, key) for key in keys]
        found = bool(keys) and (holder_of(name) != name or is_target(config, targets, name))
        if not found:
            raise ArtifactError(
                f"{path}: neither its target_modules nor its target_parameters hold {name}. Fetch it again."
            )
        if layer.rank not in ranks:
            raise malformed(
                f"{path}: {name} has rank {_or(ranks)} and alpha {_or(alphas)}, the manifest says {layer.rank}"
            )
        divisor = alpha_divisor(config, layer.rank)
        scalings = [alpha / divisor for rank, alpha in zip(ranks, alphas, strict=True) if rank == layer.rank]
        if not any(math.isclose(scaling, layer.peft_scaling, rel_tol=1e-9) for scaling in scalings):
            raise malformed(f"{path}: {name} has scaling {_or(scalings)}, the manifest says {layer.peft_scaling}")


def _pattern_keys(config: dict[str, Any], name: str) -> list[str]:
    """Return the name that PEFT matches its patterns with: the layer's, or for an expert that of a parameter.

    Which of the parameters of its module that have an adapter it is, the name of an expert does not tell.
    """
    if holder_of(name) == name:
        return [name]
    module = holder_of(name).replace(".base_layer", "")
    targets: list[str] = config.get("target_parameters") or []
    keys = [(f"{module}.{target.rpartition('.')[2]}", target) for target in targets]
    return [key for key, target in keys if f".{key}".endswith(f".{target}")]


def _or(values: list[Any]) -> str:
    return " or ".join(map(str, dict.fromkeys(values)))
