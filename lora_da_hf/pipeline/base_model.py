"""The base model under an adapter: its facts, weights and modules, by the names that they have without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from lora_da_hf.adapters.targets import base_name
from lora_da_hf.artifacts.manifest import BaseModelFacts
from lora_da_hf.artifacts.store import is_repo_id, weights_fingerprint
from lora_da_hf.distributed.parameters import gathered
from lora_da_hf.losses import base_model_of

_COMMIT = "_commit_hash"
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
_OF_ADAPTER = ("lora_", ".modules_to_save.", ".trainable_tokens_delta.")
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
"""Names that PEFT puts between a module and its weight, for adapters, modules to save and trainable tokens."""


def base_model_facts(model: nn.Module) -> BaseModelFacts:
    """Return name, revision and weights fingerprint of the base model.

    Of a folder, the name is ``./`` and its own, not where it lies; in the Hub's cache, those of the repository.
    """
    base: Any = base_model_of(model)
    config: Any = getattr(base, "config", None)
    name: str | None = getattr(config, "_name_or_path", None) or None
    revision: str | None = getattr(config, _COMMIT, None)
    if name and (Path(name).is_dir() or not is_repo_id(name)):
        path = Path(name).resolve()
        cached = _IN_CACHE.search(path.as_posix())
        name, revision = (cached[1].replace("--", "/"), cached[2]) if cached else (f"./{path.name}", None)
    weights = None if getattr(base, "is_quantized", False) else weights_fingerprint(base_weights(model))
    return BaseModelFacts(name_or_path=name, revision=revision, weights_sha256=weights)


def remember_commit(model: nn.Module, *, revision: str) -> None:
    """Note on the config of a model from the Hub the commit that it came from, as older versions of transformers did.

    Nothing else knows it later: the cache may hold several, and be elsewhere.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if name and not Path(name).is_dir() and is_repo_id(name):
        found = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
        if isinstance(found, str):
            setattr(config, _COMMIT, Path(found).parent.name)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole parameters of the base model, one by one, under the names that they have without an adapter.

    Heads are left out but for output embeddings: a classification head is random each time that a base is loaded, and a
    plain base does not tell which of its modules an adapter will train in full.
    """
    heads = head_parameters(model)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in _OF_ADAPTER) and id(parameter) not in heads:
            parts = base_name(name).split(".")  # PEFT nests its layers where it adapts two parameters of a module
            with gathered(parameter) as whole:
                yield ".".join(part for part in parts if part not in _WRAPPERS), whole


def head_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that are neither in the backbone nor output embeddings."""
    model = base_model_of(model)
    if not isinstance(model, PreTrainedModel):
        return set()
    pretrained = [model.base_model, model.get_output_embeddings()]
    known = {id(parameter) for module in pretrained if module is not None for parameter in module.parameters()}
    return {id(parameter) for parameter in model.parameters()} - known


def trained_heads(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of heads that are trained beside an adapter, by their names."""
    heads = head_parameters(model)
    infix = f".modules_to_save.{adapter_name}."
    return {name: p for name, p in model.named_parameters() if id(p) in heads and infix in name}
