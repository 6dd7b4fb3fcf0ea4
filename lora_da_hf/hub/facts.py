"""What a card can say of an initialisation, as plain values; what is not known is None or empty."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_da_hf.artifacts.fingerprint import is_repo_id
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, FileEntry, Manifest
from lora_da_hf.artifacts.statistics_store import statistics_files
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.strict_json import fits
from lora_da_hf.artifacts.tensors import tensor_specs
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ConfigError
from lora_da_hf.hub.markdown import clean
from lora_da_hf.report import LoRADAReport, kind_of

_LORA_ARGUMENTS: dict[str, Any] = {
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "target_modules": list[str],
    "target_parameters": list[str],
    "modules_to_save": list[str],
    "trainable_token_indices": list[int] | dict[str, list[int]],
    "ensure_weight_tying": bool,
    "lora_bias": bool,
    "bias": Literal["all", "lora_only"],
}
_SAVED_ANYWAY = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains in full for a task, without being told."""
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
"""Ends of names of the layers that have a row for each label."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts of a stored initialisation.

    Attributes:
        base_id: Name of the base on the Hub.
        base_name: Last part of what the base was loaded from, if that is not the Hub.
        base_revision: Commit of the base.
        base_fingerprint: SHA-256 of a sample of the base's weights.
        schema_version: Of the manifest.
        kind: Of the manifest.
        created: When it was computed.
        ranks: Ranks of the adapter, ascending.
        default_rank: `r` of the adapter: of the layers that no pattern names.
        max_rank: Largest rank that is stored of a layer.
        largest_rank: Up to which any rank can be taken for all layers.
        alpha: `lora_alpha` of the adapter.
        dropout: `lora_dropout` of the adapter.
        lora_arguments: What else a `LoraConfig` of the same layers and scalings is made with.
        task_type: PEFT's task type.
        base_class: The base model's class, which PEFT notes for an adapter without a task type.
        num_labels: Labels of a classification head that is trained beside the adapter.
        uses_rslora: Whether the scaling is ``alpha / sqrt(r)``.
        module_types: Kinds of layers, with the number of each.
        num_layers: Layers that were initialised.
        num_parameters: Numbers in the adapter's factors of these layers.
        kept: Layers that keep PEFT's own initialisation, with the reason.
        num_samples: Samples in the statistics.
        num_tokens: Tokens in the statistics.
        population_size: N of the variance term.
        data_fingerprint: SHA-256 over the samples.
        seed: Of every random choice.
        step_size: How far step 0 goes; None if it differs between layers.
        is_refitted: Whether it was made of another one, so that its step follows from stored ones.
        has_statistics: Whether the full statistics are stored.
        config: The settings.
        versions: Of the libraries.
        files: By name.
        report: What was done.
    """

    base_id: str | None
    base_name: str | None
    base_revision: str | None
    base_fingerprint: str | None
    schema_version: int
    kind: str
    created: str
    ranks: list[int]
    default_rank: int
    max_rank: int
    largest_rank: int
    alpha: float
    dropout: float
    lora_arguments: dict[str, Any]
    task_type: str | None
    base_class: str | None
    num_labels: int | None
    uses_rslora: bool
    module_types: dict[str, int]
    num_layers: int
    num_parameters: int
    kept: dict[str, str]
    num_samples: int
    num_tokens: int
    population_size: int
    data_fingerprint: str
    seed: int
    step_size: float | None
    is_refitted: bool
    has_statistics: bool
    config: LoRADAConfig
    versions: dict[str, str]
    files: dict[str, FileEntry]
    report: LoRADAReport

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())


def base_id_of(manifest: Manifest, base_model: str | None = None) -> str | None:
    """Return the name on the Hub of the base of an initialisation; None if it has none that is known.

    Args:
        manifest: Of the initialisation.
        base_model: The name, if it was computed from a local copy.

    Raises:
        ConfigError: if ``base_model`` is no name that the Hub allows.
    """
    if base_model is not None and not is_repo_id(base_model):
        raise ConfigError(f"base_model={base_model!r} is no name of a model on the Hub. Give one such as org/model.")
    name, revision = _text(manifest.base_model.name_or_path), _text(manifest.base_model.revision)
    return base_model or (name if name and is_from_hub(name, revision) else None)


def card_facts(init: StoredInit, *, base_model: str | None = None) -> CardFacts:
    """Read the facts of a stored initialisation.

    Args:
        init: What `load_init` returned. Of its folder, the header of the adapter is read.
        base_model: Name of the base on the Hub, if it was computed from a local copy.

    Raises:
        ConfigError: if ``base_model`` is no name that the Hub allows.
    """
    manifest = init.manifest
    name, revision = _text(manifest.base_model.name_or_path), _text(manifest.base_model.revision)
    base_id = base_id_of(manifest, base_model)
    adapter = init.peft_config
    layers = manifest.layers.values()
    return CardFacts(
        base_id=base_id,
        base_name=Path(name).name if name and base_id != name else None,
        base_revision=revision,
        base_fingerprint=_text(manifest.base_model.weights_sha256),
        schema_version=manifest.schema_version,
        kind=manifest.kind,
        created=manifest.created,
        ranks=sorted({layer.rank for layer in layers}),
        default_rank=adapter["r"],
        max_rank=max(layer.max_rank for layer in layers),
        largest_rank=manifest.largest_rank,
        alpha=adapter["lora_alpha"],
        dropout=adapter.get("lora_dropout", 0.0),
        lora_arguments=_lora_arguments(adapter),
        task_type=_text(adapter.get("task_type")),
        base_class=_text((adapter.get("auto_mapping") or {}).get("base_model_class")),
        num_labels=_num_labels(init.folder / ADAPTER_FILE, manifest),
        uses_rslora=adapter.get("use_rslora") is True,
        module_types=dict(Counter(map(kind_of, manifest.layers))),
        num_layers=len(layers),
        num_parameters=sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers),
        kept=manifest.report.kept,
        num_samples=manifest.report.num_samples,
        num_tokens=max(layer.num_tokens for layer in layers),
        population_size=manifest.report.population_size,
        data_fingerprint=manifest.report.data_fingerprint,
        seed=manifest.report.seed,
        step_size=manifest.report.step_size,
        is_refitted=bool(manifest.refitted_from),
        has_statistics=bool(statistics_files(manifest)),
        config=manifest.config,
        versions=manifest.versions,
        files=manifest.files,
        report=init.report,
    )


def _lora_arguments(adapter: dict[str, Any]) -> dict[str, Any]:
    """Return what an adapter's configuration says of layers, ranks and kind, where it is of PEFT's types."""
    found = {name: adapter[name] for name, hint in _LORA_ARGUMENTS.items() if fits(adapter.get(name), hint)}
    saved_anyway = _SAVED_ANYWAY.get(_text(adapter.get("task_type")) or "", ())
    found["modules_to_save"] = [name for name in found.get("modules_to_save", ()) if name not in saved_anyway]
    return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items() if value}


def _num_labels(adapter_file: Path, manifest: Manifest) -> int | None:
    """Return how many rows the head has that lies beside an adapter; None if there is none."""
    if not adapter_file.is_file():
        return None
    specs = tensor_specs(adapter_file, max_tensors=8 * (len(manifest.layers) + len(manifest.report.kept)))
    return next((shape[0] for key, (shape, _) in specs.items() if key.endswith(_HEADS) and shape), None)


def is_from_hub(name: str, revision: str | None) -> bool:
    """Tell a name on the Hub from a folder's: the former has a commit or one slash, and is no folder here.

    A folder that is named like a repository is recorded with ``./`` before its name (`base_model_facts`).
    """
    return is_repo_id(name) and (revision is not None or ("/" in name and not Path(name).is_dir()))


def _text(value: Any) -> str | None:
    return (clean(value) or None) if isinstance(value, str) else None
