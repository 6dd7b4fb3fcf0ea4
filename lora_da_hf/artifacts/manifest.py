"""The manifest of a stored initialisation: its report, and the size and hash of every other file."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError
from lora_da_hf.report import CHECKED, FEW, LayerReport, LoRADAReport, Setting

SCHEMA_VERSION = 2
INIT_FOLDER = "lora_da"
"""Where a trainer puts the initialisation, in its ``output_dir``."""
MANIFEST_FILE = "lora_da_manifest.json"
BASIS_FILE = "lora_da_basis.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
REQUIRED_FILES = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE)
STATISTICS_FILE = re.compile(r"lora_da_(statistics|leading)-[0-9]{5}-of-[0-9]{5}\.safetensors")
"""Full statistics, or the leading directions of every start in their place."""

MAX_MANIFEST_BYTES = 32 << 20
_MAX_VALUES = 2_000_000
"""More than 30,000 layers of rank 16 have. Parsed, a value can take 150 bytes."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Checked(BaseModel):
    model_config = CHECKED | ConfigDict(frozen=True)


class FileEntry(_Checked):
    """Size in bytes and SHA-256 of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class BaseModelFacts(_Checked):
    """What a base model is recognised by: the fingerprint of weights that are not quantised, or else its name."""

    name_or_path: str | None = None
    revision: str | None = None
    weights_sha256: Sha256 | None = None


class RefittedFrom(_Checked):
    """The digest of the manifest that it was made from, and the settings that changed after the step was found."""

    manifest: str
    changed: Annotated[dict[str, Setting], FEW] = {}


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
    versions: Annotated[dict[str, str], FEW]
    base_model: BaseModelFacts
    identity: Annotated[dict[str, str | float], FEW] = {}
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
        settings: dict[str, Any] = self.report.config
        return LoRADAConfig(**settings)

    @property
    def statistics_files(self) -> list[str]:
        """The names of the files of the full statistics, in order; none if they were not stored."""
        return sorted(name for name in self.files if name.startswith("lora_da_statistics"))

    @property
    def leading_files(self) -> list[str]:
        """The same of the leading directions of the other starts."""
        return sorted(name for name in self.files if name.startswith("lora_da_leading"))

    @property
    def num_bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

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
        if manifest.to_json().encode() != data:  # which has the checksum in it, and each value to the letter
            raise ValueError("its checksum is wrong: it was changed")
        files, layers = manifest.files, manifest.report.layers  # which may contradict each other
        odd = [name for name in files if name not in REQUIRED_FILES and not STATISTICS_FILE.fullmatch(name)]
        if odd or not set(REQUIRED_FILES) <= set(files):
            raise ValueError(f"it lists {odd[0]!r}" if odd else "it does not list every file")
        if not layers or len(manifest.layers) != len(layers):
            raise ValueError("it lists no layer, or one twice")
        for layer in layers:
            if not layer.rank <= layer.max_rank <= layer.in_features:
                raise ValueError(f"the sizes of layer {layer.name} contradict each other")
        _ = manifest.config  # checks the settings
    except (ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(
            f"{source} is not one that this version of lora_da_hf reads ({explained(error)})."
        ) from error
    return manifest


def explained(error: Exception) -> str:
    """Say in one line what is wrong with a JSON file: of a ValidationError the first value, and how."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:160]
    return f"{where}: {first['msg']}" if where else first["msg"]
