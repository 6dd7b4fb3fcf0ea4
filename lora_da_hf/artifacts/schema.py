"""The manifest of a stored initialisation, and the checks that reading one makes."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_da_hf.artifacts.strict_json import check_types, fits, malformed, parse_json, read_dataclass, too_large
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError

SCHEMA_VERSION = 1
KIND = "lora-da-init"
CHECKSUM = "checksum"
REFITTED_FROM = "refitted_from"
IDENTITY = "identity"
INIT_FOLDER = "lora_da"
"""Where a trainer puts the initialisation, in its ``output_dir``."""
MANIFEST_FILE = "lora_da_manifest.json"
BASIS_FILE = "lora_da_basis.safetensors"
REPORT_FILE = "lora_da_report.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
REQUIRED_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE, REPORT_FILE)
STATISTICS_PREFIX = "lora_da_statistics-"
STATISTICS_SHARD = re.compile(re.escape(STATISTICS_PREFIX) + r"([0-9]{5})-of-([0-9]{5})\.safetensors")
MAX_MANIFEST_BYTES = 24 << 20
"""Of 60,000 layers, of some 400 bytes each. Parsed, JSON from outside can take thirty times its length."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**31
_DATA_FACTS: dict[str, Any] = {
    "fingerprint": str,
    "num_samples": int,
    "num_unlabelled": int,
    "num_search_samples": int,
    "population_size": int,
}
LOSS, MOVED_LOSS = "loss", "loss of moved outputs"
_IDENTITY_FACTS = {"settings", "base model", "adapter", "samples", "version of lora_da_hf", LOSS}
"""What every identity has beside further losses, whose names begin with that of the first."""
_BASE_FACTS: dict[str, Any] = {
    "name_or_path": str | None,
    "revision": str | None,
    "config": dict[str, int | float | str | bool],
    "weights_sha256": str | None,
}


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """What the manifest says of one layer.

    Attributes:
        in_features: d_in.
        out_features: d_out.
        rank: Rank of the adapter that was written.
        max_rank: Rank of the stored basis.
        peft_scaling: PEFT's scaling of that adapter.
        shares_input_with: The layer whose input second moment it shares: itself if none.
        input_damping: Damping added to the input second moment.
        output_damping: Damping added to the output diagonal.
        num_tokens: Tokens in the input second moment.
        num_grad_tokens: Tokens in the output-gradient second moment.
    """

    in_features: int
    out_features: int
    rank: int
    max_rank: int
    peft_scaling: float
    shares_input_with: str
    input_damping: float
    output_damping: float
    num_tokens: int
    num_grad_tokens: int


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an initialisation that is not a tensor.

    Attributes:
        schema_version: Version of this layout.
        kind: Always ``"lora-da-init"``.
        created: When, in ISO 8601, UTC.
        config: The settings.
        base_model: Name, revision, config facts and weights fingerprint of the base.
        data: Fingerprint and counts of the samples; never their text.
        adapter_name: The adapter's name in PEFT.
        step_size: How far step 0 goes; None if it differs between layers.
        step_size_by_rank: The searched step for a ladder of ranks.
        seed: Of every random choice.
        versions: Of the libraries.
        layers: By name.
        kept: Layers that keep PEFT's own initialisation, with the reason.
        files: By name, all files of the folder but the manifest.
        refitted_from: The SHA-256 of the manifest that it was refitted from, and what was changed; empty if it was
            computed from data.
    """

    config: dict[str, Any]
    base_model: dict[str, Any]
    data: dict[str, Any]
    adapter_name: str
    created: str
    step_size: float | None
    step_size_by_rank: dict[str, float]
    seed: int
    versions: dict[str, str]
    layers: dict[str, LayerEntry]
    kept: dict[str, str]
    files: dict[str, FileEntry]
    refitted_from: dict[str, Any] = field(default_factory=dict[str, Any])
    schema_version: int = SCHEMA_VERSION
    kind: str = field(default=KIND)

    @property
    def largest_rank(self) -> int:
        """Up to which any rank can be taken for all layers; one that is stored with all its directions is no limit."""
        limits = [layer.max_rank for layer in self.layers.values() if layer.max_rank < layer.in_features]
        return min(limits) if limits else max(layer.max_rank for layer in self.layers.values())

    def to_json(self) -> str:
        """Return the manifest as JSON text, with a checksum of everything else in it."""
        values = dataclasses.asdict(self)
        if not self.refitted_from:  # only manifests of refitted ones have it
            del values[REFITTED_FROM]
        return _to_json({**values, CHECKSUM: hashlib.sha256(_to_json(values).encode()).hexdigest()})


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Read and validate a manifest.

    Args:
        data: JSON in UTF-8.
        source: Where it comes from, for messages.

    Raises:
        ArtifactError: if it is no JSON, of another schema, a field is missing, unknown, of the wrong type or out of
            range, two of them contradict each other, or the text is not to the letter what was written.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise too_large(source, len(data), MAX_MANIFEST_BYTES)
    fields = parse_json(data, source)
    if not isinstance(fields, dict) or fields.get("kind") != KIND:
        raise malformed(f"{source} is not the manifest of a LoRA-DA initialisation")
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{source} has schema version {fields.get('schema_version')!r} and this version of lora_da_hf reads "
            f"{SCHEMA_VERSION}. Install the version that wrote it, or compute the initialisation again."
        )
    layers = _entries(LayerEntry, fields.get("layers"), source, "layer")
    files = _entries(FileEntry, fields.get("files"), source, "file")
    rest = {name: value for name, value in fields.items() if name != CHECKSUM}
    manifest: Manifest = read_dataclass(Manifest, {REFITTED_FROM: {}, **rest, "layers": layers, "files": files}, source)
    _check_files(manifest.files, source)
    _check_layers(manifest, source)
    _check_facts(manifest, source)
    if manifest.to_json().encode() != data:
        raise ArtifactError(f"{source} was changed after it was written: its checksum is another. Fetch it again.")
    return manifest


def _entries(kind: Any, values: Any, source: str, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ArtifactError(f"{source}: {what}s is missing or no mapping. Fetch it again.")
    entries: dict[str, Any] = values
    return {name: read_dataclass(kind, value, f"{source}: {what} {name}") for name, value in entries.items()}


def _check_files(files: Mapping[str, FileEntry], source: str) -> None:
    shards = [match for match in map(STATISTICS_SHARD.fullmatch, files) if match]
    allowed = {*REQUIRED_FILES, *(shard.group() for shard in shards)}
    for name, entry in files.items():
        if name not in allowed or not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise malformed(f"{source}: the entry of file {name!r} is malformed")
    missing = [name for name in REQUIRED_FILES if name not in files]
    if missing:
        raise malformed(f"{source}: the files {missing} are not listed")
    if sorted(int(shard[1]) for shard in shards) != list(range(1, len(shards) + 1)) or any(
        int(shard[2]) != len(shards) for shard in shards
    ):
        raise malformed(f"{source}: the statistics are listed in part: {sorted(s.group() for s in shards)[:3]}")


def _check_layers(manifest: Manifest, source: str) -> None:
    if not manifest.layers:
        raise malformed(f"{source}: it lists no layer")
    for name, layer in manifest.layers.items():
        sizes = (layer.in_features, layer.out_features, layer.rank, layer.max_rank)
        if not all(0 < size < _MAX_SIZE for size in sizes) or not layer.rank <= layer.max_rank <= layer.in_features:
            raise malformed(f"{source}: the sizes of layer {name} contradict each other")
        leader = manifest.layers.get(layer.shares_input_with)
        positive = layer.peft_scaling > 0 and layer.num_tokens > 0 and layer.num_grad_tokens > 0
        if not positive or min(layer.input_damping, layer.output_damping) < 0 or leader is None:
            raise malformed(f"{source}: the entry of layer {name} is malformed")
        if leader.shares_input_with != layer.shares_input_with or any(
            getattr(leader, what) != getattr(layer, what) for what in ("in_features", "num_tokens", "input_damping")
        ):
            raise malformed(
                f"{source}: layer {name} shares the input of {layer.shares_input_with}, and they contradict each other"
            )
    both = sorted(set(manifest.kept) & set(manifest.layers))
    if both:
        raise malformed(f"{source}: layer {both[0]} is both initialised and kept as PEFT made it")


def _check_facts(manifest: Manifest, source: str) -> None:
    """Verify what is not about one layer: settings, data, base, steps, seed, versions."""
    try:
        config = LoRADAConfig.from_dict(manifest.config)
    except ConfigError as error:
        raise ArtifactError(
            f"{source}: the settings are not valid. {error} Install the version that wrote it, or compute the "
            "initialisation again."
        ) from error
    for what, facts, hints, optional in (
        ("data", manifest.data, _DATA_FACTS, {IDENTITY: dict[str, str | float]}),
        ("base_model", manifest.base_model, _BASE_FACTS, {}),
    ):
        missing = sorted(set(hints) - set(facts))
        if missing:
            raise ArtifactError(f"{source}: {what} does not say {missing}. Fetch it again.")
        known = {**hints, **optional}
        check_types(facts, known, f"{source}: {what}")
        if not all(fits(value, int | float | str | bool | None) for key, value in facts.items() if key not in known):
            raise malformed(f"{source}: {what} holds more than plain facts")
    if manifest.base_model["name_or_path"] == "":
        raise ArtifactError(f"{source}: the base model has an empty name. Fetch it again.")
    weights = manifest.base_model["weights_sha256"]
    identified = manifest.data.get(IDENTITY, {})
    named = {key for key in identified if not key.startswith(f"{LOSS} of ")}
    if named != (set() if manifest.refitted_from else _IDENTITY_FACTS):
        raise ArtifactError(f"{source}: data says of its identity {sorted(identified)}, and not all. Fetch it again.")
    identity = [value for key, value in identified.items() if key in named - {LOSS}]
    hashes = [manifest.data["fingerprint"], *([] if weights is None else [weights]), *map(str, identity)]
    counts = [manifest.data[name] for name, hint in _DATA_FACTS.items() if hint is int]
    if not all(map(_SHA256.fullmatch, hashes)) or min(counts) < 0 or manifest.data["population_size"] < 1:
        raise malformed(f"{source}: a fingerprint or a count is malformed")
    largest = max(layer.max_rank for layer in manifest.layers.values())
    steps = [manifest.step_size or 0.0, *manifest.step_size_by_rank.values()]
    ranks = manifest.step_size_by_rank
    if min(steps) < 0 or not fits(ranks, dict[int, float]) or any(not 0 < int(rank) <= largest for rank in ranks):
        raise malformed(f"{source}: the steps are malformed: {dict(list(ranks.items())[:3])}")
    if manifest.seed < 0 or config.seed not in (None, manifest.seed):
        raise malformed(f"{source}: seed {manifest.seed} contradicts the settings, which say {config.seed}")
    if not manifest.adapter_name or "lora_da_hf" not in manifest.versions:
        raise malformed(f"{source}: the adapter's name or the version that wrote it is missing")
    try:
        datetime.datetime.fromisoformat(manifest.created)
    except ValueError as error:
        raise malformed(f"{source}: created={manifest.created!r} is no date") from error
