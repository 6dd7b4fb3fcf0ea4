"""The manifest of a stored initialisation: its report, and the size and hash of every other file."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, ConfigError
from lora_da_hf.report import LayerReport, LoRADAReport

SCHEMA_VERSION = 2
INIT_FOLDER = "lora_da"
"""Where a trainer puts the initialisation, in its ``output_dir``."""
MANIFEST_FILE = "lora_da_manifest.json"
BASIS_FILE = "lora_da_basis.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
REQUIRED_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE)
STATISTICS_PREFIX = "lora_da_statistics-"
STATISTICS_SHARD = re.compile(re.escape(STATISTICS_PREFIX) + r"([0-9]{5})-of-([0-9]{5})\.safetensors")

MAX_MANIFEST_BYTES = 32 << 20
_MAX_VALUES = 2_000_000
"""More than 30,000 layers of rank 16 have. Parsed, a value can take 150 bytes."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Few = Field(max_length=1000)
Setting = bool | int | float | str | None


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=4096)


class FileEntry(_Checked):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class BaseModelFacts(_Checked):
    """What a base model is recognised by: its config, and the fingerprint of weights that are not quantised."""

    name_or_path: str | None = None
    revision: str | None = None
    config: Annotated[dict[str, bool | int | float | str], _Few] = {}
    weights_sha256: Sha256 | None = None


class RefittedFrom(_Checked):
    """The digest of the manifest that it was made from, and the settings that changed after the step was found."""

    manifest: str
    changed: Annotated[dict[str, Setting], _Few] = {}


class Manifest(_Checked):
    """Everything of an initialisation that is not a tensor.

    Attributes:
        created: When, in ISO 8601, UTC.
        identity: What a later run must have in common with this one to use it; empty if it was refitted.
        refitted_from: None if it was computed from data.
        files: By name, all files of the folder but the manifest.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    kind: Literal["lora-da-init"] = "lora-da-init"
    created: Annotated[str, Field(pattern=r"^[0-9T:.+-]{10,40}$")]
    versions: Annotated[dict[str, str], _Few]
    base_model: BaseModelFacts
    identity: Annotated[dict[str, str | float], _Few] = {}
    refitted_from: RefittedFrom | None = None
    files: Annotated[dict[str, FileEntry], Field(max_length=100_000)]
    report: LoRADAReport

    @cached_property
    def layers(self) -> dict[str, LayerReport]:
        """By name."""
        return {layer.name: layer for layer in self.report.layers}

    @cached_property
    def config(self) -> LoRADAConfig:
        """The settings."""
        return LoRADAConfig.from_dict(self.report.config)

    @property
    def statistics_files(self) -> list[str]:
        """The names of the files of the full statistics, in order; none if they were not stored."""
        return sorted(name for name in self.files if name.startswith(STATISTICS_PREFIX))

    @property
    def largest_rank(self) -> int:
        """The largest rank for all layers together; one that is stored with all its directions does not limit it."""
        limits = [layer.max_rank for layer in self.report.layers if layer.max_rank < layer.in_features]
        return min(limits) if limits else max(layer.max_rank for layer in self.report.layers)

    @property
    def digest(self) -> str:
        """``sha256:`` and the hash of the manifest's file, which names an initialisation wherever it lies."""
        return f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def to_json(self) -> str:
        """Return the manifest as JSON text, with a checksum of everything else in it."""
        rest = self.model_dump_json(indent=1)[1:] + "\n"
        return f'{{\n "checksum": "{hashlib.sha256(rest.encode()).hexdigest()}",{rest}'


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Read and check a manifest; messages name its ``source``.

    Raises:
        ArtifactError: if it was changed, has another schema, or says something that cannot be.
    """
    if len(data) > MAX_MANIFEST_BYTES or data.count(b",") > _MAX_VALUES:
        raise ArtifactError(f"{source} is larger than any manifest can be. Do not use it.")
    try:
        values = from_json(data, allow_inf_nan=False)
        values.pop("checksum", None)
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        if any(found["loc"] == ("schema_version",) for found in error.errors(include_url=False, include_input=False)):
            raise ArtifactError(
                f"{source} does not have schema version {SCHEMA_VERSION}, which this version of lora_da_hf reads. "
                "Install the version that wrote it, or compute the initialisation again."
            ) from error
        raise ArtifactError(f"{source} is not a valid manifest ({explained(error)}). Do not use it.") from error
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{source} is not a JSON object ({error}). Get a new copy.") from error
    if manifest.to_json().encode() != data:  # which has the checksum in it, and each value to the letter
        raise ArtifactError(f"{source} was changed after it was written: its checksum is wrong. Get a new copy.")
    problem = _problem(manifest)
    if problem:
        raise ArtifactError(f"{source}: {problem}. Do not use it.")
    return manifest


def explained(error: ValidationError) -> str:
    """Say which value of a JSON file is wrong, and how: the first, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:160]
    return f"{where}: {first['msg']}" if where else first["msg"]


def _problem(manifest: Manifest) -> str | None:
    """Say what in a manifest contradicts itself; None if nothing does."""
    report, files = manifest.report, manifest.files
    shards = [shard for shard in map(STATISTICS_SHARD.fullmatch, files) if shard]
    odd = [name for name in files if name not in REQUIRED_FILES and not STATISTICS_SHARD.fullmatch(name)]
    numbers = sorted((int(shard[1]), int(shard[2])) for shard in shards)
    if odd or not set(REQUIRED_FILES) <= set(files):
        return f"it lists {odd[0]!r}, which is not a file of an initialisation" if odd else "a file is not listed"
    if numbers != [(number, len(shards)) for number in range(1, len(shards) + 1)]:
        return "it lists only a part of the statistics"
    if not report.layers or len(manifest.layers) != len(report.layers):
        return "it lists no layer, or one twice"
    if any(len(name) > 512 or name.count(".") > 64 for name in (*manifest.layers, *report.kept)):
        return "the name of a layer is too long"
    for name, layer in manifest.layers.items():
        leader = manifest.layers.get(layer.shares_input_with)
        if not 0 < layer.rank <= layer.max_rank <= layer.in_features or layer.out_features < 1:
            return f"the sizes of layer {name} contradict each other"
        if min(layer.peft_scaling, layer.num_tokens, layer.num_grad_tokens, layer.displacement_norm) <= 0:
            return f"layer {name} has a scaling, a count or a norm that is not above 0"
        if leader is None or leader.shares_input_with != leader.name or leader.in_features != layer.in_features:
            return f"layer {name} shares the input of {layer.shares_input_with!r}, which it cannot"
    steps = report.step_size_by_rank
    if min(report.step_size or 0.0, report.step_unit, *steps.values()) < 0 or min(steps, default=1) < 1:
        return "a step is negative"
    try:
        LoRADAConfig.from_dict(report.config)
    except ConfigError as error:
        return f"the settings are not valid ({error})"
    return None
