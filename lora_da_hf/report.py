"""What an initialisation did, as a table for people and JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, FailFast, Field, TypeAdapter

_FULL_TABLE_UP_TO = 32
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=4096, revalidate_instances="always")
"""How pydantic checks a report that goes into a manifest, or comes from one."""
FEW = Field(max_length=1000)
Setting = bool | int | float | str | None
_Name = Annotated[str, Field(max_length=512)]
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Step = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        peft_scaling: What PEFT multiplies ``B A`` with.
        shares_input_with: The layer whose input second moment it shares: itself if it shares none.
        num_tokens: In its input second moment; `num_grad_tokens` in that of its output gradients.
        input_damping: What was added to the diagonal of the moment.
        eigenvalues: ``[max_rank]``, ascending, and `displacement_norm`: as in `LayerSolution`.
        residual: Of the eigensolver, relative to the largest eigenvalue.
        update_norm: Frobenius norm of ``scaling * B @ A`` as written.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    name: _Name
    in_features: _Count
    out_features: _Count
    rank: _Count
    peft_scaling: _Positive
    shares_input_with: str
    num_tokens: _Count
    num_grad_tokens: _Count
    input_damping: float
    output_damping: float
    eigenvalues: Annotated[list[float], FailFast()]
    displacement_norm: _Positive
    solver: str
    residual: float
    update_norm: float = 0.0
    notes: Annotated[list[str], FEW] = field(default_factory=list)

    @property
    def max_rank(self) -> int:
        """Rank of the stored basis."""
        return len(self.eigenvalues)


@dataclass(kw_only=True)
class LoRADAReport:
    """What an initialisation did.

    Attributes:
        kept: Layers that keep PEFT's own initialisation, with the reason.
        num_unlabelled: Samples left out because they have no label.
        num_unseen_samples: Those of the two losses before and after, used for nothing else.
        population_size: N of the variance term.
        loss_reduction: What the loss of a batch is, and where that is known from.
        step_unit: What the displacements over tokens were divided by, so that a step is the spectral norm that the
            displacement of the layer that goes farthest is brought to; 1 with ``layer_steps="equal"``.
        step_size: How far step 0 goes; 0 if no step earned its length, so that B is zero; None if the
            layers' steps differ (`stable_gamma`).
        step_size_by_rank: The searched step for a ladder of ranks.
        search: Steps tried, with their losses; None for one that is not finite.
        search_loss_after: At the step that was taken, before it is written.
        unseen_loss_error: Standard error of the difference between the two losses, by how it varies over samples.
        data_fingerprint: SHA-256 over the samples of the statistics, by their tokens if they have any.
        artifact: The folder that the initialisation was written to or read from, on this machine.
        init_from: The stored initialisation that this started from, as `StoredInit.source`; None if it was computed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    layers: Annotated[list[LayerReport], FailFast()] = field(default_factory=list)
    kept: Annotated[dict[_Name, str], Field(max_length=100_000)] = field(default_factory=dict)
    adapter_name: str = "default"
    seed: int = 0
    num_samples: int = 0
    num_unlabelled: int = 0
    num_search_samples: int = 0
    num_unseen_samples: int = 0
    population_size: int = 0
    batch_size: int = 1
    loss_reduction: str = ""
    step_unit: _Step = 1.0
    step_size: _Step | None = None
    step_size_by_rank: Annotated[dict[_Count, _Step], FEW] = field(default_factory=dict)
    search: Annotated[list[tuple[float, float | None]], FEW] = field(default_factory=list)
    search_loss_before: float | None = None
    search_loss_after: float | None = None
    unseen_loss_before: float | None = None
    unseen_loss_after: float | None = None
    unseen_loss_error: float | None = None
    seconds: Annotated[dict[str, float], FEW] = field(default_factory=dict)
    config: Annotated[dict[str, Setting], FEW] = field(default_factory=dict)
    data_fingerprint: str = ""
    notes: Annotated[list[str], FEW] = field(default_factory=list)
    artifact: str | None = None
    init_from: str | None = None
    plan: str = ""

    @property
    def total_seconds(self) -> float:
        """Time of all stages together."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LoRADAReport:
        """Read what `save` wrote."""
        return TypeAdapter(cls).validate_json(Path(path).read_bytes())

    def metrics(self) -> dict[str, float]:
        """Return the few numbers that belong in a training log."""
        losses = [f"{which}_loss_{when}" for which in ("search", "unseen") for when in ("before", "after")]
        values = {name: getattr(self, name) for name in ("step_size", *losses, "unseen_loss_error")}
        values |= {"seconds": self.total_seconds, "layers": len(self.layers), "layers_kept": len(self.kept)}
        return {f"lora_da_{name}": float(value) for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        """Return the report as text, with a row for each layer or, of many, for each kind of layer, with ranges."""
        every_layer = len(self.layers) <= _FULL_TABLE_UP_TO
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name if every_layer else kind_of(layer.name), []).append(layer)
        titles = {k: group[0].name if len(group) == 1 else f"{k} ({len(group)} layers)" for k, group in kinds.items()}
        rows = [[titles[kind], *(column(group) for column in COLUMNS.values())] for kind, group in kinds.items()]
        table = in_columns(rows, ["layer", *COLUMNS])
        parts = [self._summary(), "", *table]
        if self.kept:
            parts += ["", f"{len(self.kept)} layers keep PEFT's own initialisation:"]
            parts += [f"  {name}: {reason}" for name, reason in self.kept.items()]
        noted = [(layer.name, note) for layer in self.layers for note in layer.notes]
        if noted:
            parts += ["", "Notes:", *(f"  {name}: {note}" for name, note in noted[:20])]
            parts += [f"  ... and {len(noted) - 20} more in the manifest"] if len(noted) > 20 else []
        return "\n".join(parts)

    def _summary(self) -> str:
        """Return the head of the table: samples, step, losses and times."""
        step = "by layer (stable_gamma)" if self.step_size is None else f"{self.step_size:.4g}"
        start, lengths = self.config.get("start", "lora_da"), self.config.get("layer_steps")
        if lengths and self.step_size != 0:
            natural = lengths == "displacement" and start != "gradient"
            step += "; each layer as far as its natural gradient step" if natural else "; all layers equally far"
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        lines = [
            f"init from   {self.init_from}{f' ({self.artifact})' if self.artifact else ''}" if self.init_from else "",
            f"samples     {self.num_samples} (population {self.population_size}), {self.batch_size} at a time; "
            f"loss: {self.loss_reduction}",
            f"plan        {self.plan}" if self.plan else "",
            f"start       {start}" if start != "lora_da" else "",
            f"step size   {step}",
            _loss_line("search", self.num_search_samples, self.search_loss_before, self.search_loss_after),
            _loss_line("unseen", self.num_unseen_samples, self.unseen_loss_before, self.unseen_loss_after)
            + ("" if self.unseen_loss_error is None else f", ± {self.unseen_loss_error:.4f}"),
            f"time        {times}" if times else "",
        ]
        lines = [line for line in lines if line] + [f"note        {note}" for note in self.notes]
        return "\n  ".join(["LoRA-DA initialisation", *lines])


def _loss_line(which: str, count: int, before: float | None, after: float | None) -> str:
    if before is None:
        return ""
    change = f" -> {after:.4f} ({100 * (after - before) / abs(before):+.1f} %)" if after is not None and before else ""
    return f"loss        {before:.4f}{change} on {count} {which} samples"


def kind_of(name: str) -> str:
    """Return what layers of one kind share of their names: the last part, without the number of an expert.

    Where PEFT adapts two parameters of a module, one of them is its ``base_layer``, which is a kind of its own.
    """
    start, _, last = re.sub(r"\[\d+\]$", "", name).rpartition(".")
    return f"{start.rpartition('.')[2]}.{last}" if last == "base_layer" else last


def span(values: Sequence[float], form: str, to: str = " .. ") -> str:
    """Return the lowest and the highest of some numbers, or the one that all are."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}{to}{high}"


COLUMNS: dict[str, Callable[[list[LayerReport]], str]] = {
    "rank": lambda layers: span([layer.rank for layer in layers], "d"),
    "tokens": lambda layers: span([layer.num_tokens for layer in layers], "d"),
    "displacement": lambda layers: span([layer.displacement_norm for layer in layers], ".1e"),
    "lowest eigenvalue": lambda layers: span([layer.eigenvalues[0] for layer in layers], ".2g"),
    "residual": lambda layers: f"{max(layer.residual for layer in layers):.0e}",
    "|sBA|": lambda layers: span([layer.update_norm for layer in layers], ".3g"),
}
"""What the table says of the layers of a row; the manifest has the rest."""


def in_columns(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> list[str]:
    """Return the lines of a table: rows of text in columns, under a header if there is one."""
    cells = [*([header] if header else []), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if header:
        cells.insert(1, ["-" * width for width in widths])
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
