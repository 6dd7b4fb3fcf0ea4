"""The manifest of a stored initialisation, and the checks that reading one makes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lora_da_hf.errors import ArtifactError

SCHEMA_VERSION = 1
KIND = "lora-da-init"
CHECKSUM = "checksum"
REFITTED_FROM = "refitted_from"
MANIFEST_FILE = "lora_da_manifest.json"
BASIS_FILE = "lora_da_basis.safetensors"
REPORT_FILE = "lora_da_report.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
REQUIRED_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE, REPORT_FILE)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**31


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

    def to_json(self) -> str:
        """Return the manifest as JSON text, with a checksum of everything else in it."""
        values = dataclasses.asdict(self)
        if not self.refitted_from:  # only manifests of refitted ones have it
            del values[REFITTED_FROM]
        return _to_json({**values, CHECKSUM: hashlib.sha256(_to_json(values).encode()).hexdigest()})


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def parse_manifest(text: str, *, source: str) -> Manifest:
    """Read and validate the text of a manifest.

    Args:
        text: JSON.
        source: Where it comes from, for messages.

    Raises:
        ArtifactError: if it is no JSON, of another schema, a field is missing, unknown or of the wrong type, or the
            text is not to the letter what was written.
    """
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid JSON ({error}): truncated or changed. Fetch it again.") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ArtifactError(f"{source} is not the manifest of a LoRA-DA initialisation.")
    fields: dict[str, Any] = values
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{source} has schema version {fields.get('schema_version')!r} and this version of lora_da_hf reads "
            f"{SCHEMA_VERSION}. Install the version that wrote it, or compute the initialisation again."
        )
    layers = {n: _read(LayerEntry, v, f"{source}: layer {n}") for n, v in _mapping(fields, "layers", source).items()}
    files = {n: _read(FileEntry, v, f"{source}: file {n}") for n, v in _mapping(fields, "files", source).items()}
    rest = {REFITTED_FROM: {}, **{name: value for name, value in fields.items() if name != CHECKSUM}}
    manifest = _read(Manifest, {**rest, "layers": layers, "files": files}, source)
    _check_values(manifest, source)
    if manifest.to_json() != text:
        raise ArtifactError(f"{source} was changed after it was written: its checksum is another. Fetch it again.")
    return manifest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _mapping(values: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ArtifactError(f"{source}: {name} is missing or no mapping.")
    return found  # pyright: ignore[reportUnknownVariableType]


def _read(kind: Any, values: Any, source: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(hints):  # pyright: ignore[reportUnknownArgumentType]
        raise ArtifactError(f"{source}: expected the fields {sorted(hints)}.")
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise ArtifactError(f"{source}: {name}={values[name]!r} is not {hint}.")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    if hint == float | None:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = getattr(hint, "__origin__", hint)
    if not isinstance(value, origin):
        return False
    if origin is dict:
        return all(_fits(v, hint.__args__[1]) for v in value.values()) if hint.__args__[1] is not Any else True
    return True


def _check_values(manifest: Manifest, source: str) -> None:
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise ArtifactError(f"{source}: the entry of file {name!r} is malformed.")
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise ArtifactError(f"{source}: the files {missing} are not listed.")
    for name, layer in manifest.layers.items():
        sizes = (layer.in_features, layer.out_features, layer.rank, layer.max_rank)
        if not all(0 < size < _MAX_SIZE for size in sizes) or not layer.rank <= layer.max_rank <= layer.in_features:
            raise ArtifactError(f"{source}: the sizes of layer {name} contradict each other.")
        if not 0 < layer.peft_scaling < float("inf") or layer.shares_input_with not in manifest.layers:
            raise ArtifactError(f"{source}: the entry of layer {name} is malformed.")
    if not manifest.layers:
        raise ArtifactError(f"{source}: it lists no layer.")
