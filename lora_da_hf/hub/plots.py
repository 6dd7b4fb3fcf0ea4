"""Plots of an initialisation, from its report alone: the guidance spectra, and the search for the step."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterable
from typing import Any

from lora_da_hf.artifacts.card_files import SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.errors import MissingDependencyError
from lora_da_hf.hub.markdown import clean
from lora_da_hf.report import LayerReport, LoRADAReport, kind_of

_MOST_TYPES = 10
_MOST_TICKS = 8
_OTHERS = "all others"
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def draw_plots(report: LoRADAReport) -> dict[str, bytes]:
    """Draw the spectra, and the search if there was one.

    Returns:
        PNG files by name.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    plots = {SPECTRA_PLOT: draw_spectra(report)}
    if report.search and report.search_loss_before is not None:
        plots[SEARCH_PLOT] = draw_search(report)
    return plots


def draw_spectra(report: LoRADAReport) -> bytes:
    """Draw the spectra of the guidance matrices as a PNG.

    Left, for each module type, the gain ``-eigenvalue`` of each stored direction, relative to the layer's first: the
    median over the layers, and their middle half. Right, for each layer, how many directions matter: the sum of the
    positive gains over the largest.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    figure = _figure(11)
    left, right = figure.subplots(1, 2)
    groups = _by_type(report.layers)
    for color, (kind, layers) in zip(_colors(len(groups)), groups.items(), strict=True):
        columns = _columns([relative_gains(layer) for layer in layers])
        ranks = range(1, len(columns) + 1)
        left.plot(ranks, [statistics.median(column) for column in columns], color=color, label=kind, marker=".")
        left.fill_between(ranks, *_middle_half(columns), color=color, alpha=0.12, lw=0)
        depths = _by_depth(layers)
        heights = [statistics.median(map(directions_that_matter, depths[depth])) for depth in depths]
        right.plot(list(depths), heights, color=color, marker=".", lw=1)
    left.axhline(0, color="black", lw=0.8)
    left.set(
        title="Guidance spectra by module type",
        xlabel="direction (stored rank)",
        ylabel="gain relative to the layer's first direction",
    )
    right.set(
        title="Directions that matter, by layer",
        xlabel="layer",
        ylabel="sum of gains / largest gain",
        ylim=(0, None),
    )
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(groups), 8), frameon=False)
    return _png(figure)


def draw_search(report: LoRADAReport) -> bytes:
    """Draw the losses of the steps that the line search tried as a PNG.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    figure = _figure(7)
    axes = figure.subplots()
    tried = sorted((step, loss) for step, loss in report.search if loss is not None)
    before = report.search_loss_before
    axes.plot([s for s, _ in tried], [loss for _, loss in tried], marker="o", label="steps tried")
    if before is not None:
        axes.axhline(before, color="grey", ls="--", label=f"base model ({before:.4f})")
        axes.set_ylim(*_limits([loss for _, loss in tried], before))
    if report.step_size and report.search_loss_after is not None:
        label = f"chosen: {report.step_size:.3g} ({report.search_loss_after:.4f})"
        axes.plot([report.step_size], [report.search_loss_after], "*", ms=14, color="tab:orange", label=label)
    failed = [step for step, loss in report.search if loss is None]
    if failed:
        axes.plot(
            failed, [0.97] * len(failed), "x", color="tab:red", transform=axes.get_xaxis_transform(), label="no loss"
        )
    axes.set(
        title="Search for the step",
        xlabel="step size",
        ylabel=f"mean loss on {report.num_search_samples} search samples",
        xscale="log",
    )
    if len(report.search) <= _MOST_TICKS:
        steps = sorted(step for step, _ in report.search)
        axes.set_xticks(steps, [f"{step:.2g}" for step in steps])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def relative_gains(layer: LayerReport) -> list[float]:
    """Return the gains ``-eigenvalue`` of a layer's directions over the size of the first."""
    first = abs(layer.eigenvalues[0]) or 1.0
    return [-value / first for value in layer.eigenvalues]


def directions_that_matter(layer: LayerReport) -> float:
    """Return the sum of a layer's positive gains over the largest; 0 if no direction gains."""
    gains = [-value for value in layer.eigenvalues if value < 0]
    return sum(gains) / max(gains) if gains else 0.0


def _by_type(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Group layers by module type; types beyond the tenth are one group."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(_label(kind_of(layer.name)), []).append(layer)
    if len(groups) <= _MOST_TYPES:
        return groups
    kinds = list(groups)
    rest = [layer for kind in kinds[_MOST_TYPES - 1 :] for layer in groups[kind]]
    return {**{kind: groups[kind] for kind in kinds[: _MOST_TYPES - 1]}, _OTHERS: rest}


def _label(name: str) -> str:
    """Return a name that matplotlib shows as it is: no formula, no hidden label, no character that its font lacks."""
    shown = clean(name).encode("ascii", "backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown or "(no name)"


def _by_depth(layers: Iterable[LayerReport]) -> dict[int, list[LayerReport]]:
    """Group layers by the first number in their name, which is the block's in transformers; 0 without one."""
    groups: dict[int, list[LayerReport]] = {}
    for layer in layers:
        found = _NUMBER.search(layer.name)
        groups.setdefault(int(found[1][:6]) if found else 0, []).append(layer)
    return dict(sorted(groups.items()))


def _columns(rows: list[list[float]]) -> list[list[float]]:
    """Turn rows of different lengths into columns."""
    return [[row[k] for row in rows if k < len(row)] for k in range(max(map(len, rows)))]


def _middle_half(columns: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return the lower and the upper quartile of each column."""
    quartiles = [
        statistics.quantiles(column, n=4, method="inclusive") if column[1:] else column * 3 for column in columns
    ]
    return [low for low, _, _ in quartiles], [high for _, _, high in quartiles]


def _limits(losses: list[float], before: float) -> tuple[float, float]:
    """Return the ends of the axis, which leave steps that are much too large outside, so that the minimum is seen."""
    lowest = min([*losses, before])
    gain = max(before - lowest, 0.01 * abs(before), 1e-6)
    highest = min(max([*losses, before]), before + 2 * gain)
    margin = 0.08 * max(highest - lowest, gain)
    return lowest - margin, highest + margin


def _colors(count: int) -> list[str]:
    return [f"C{number}" for number in range(count)]


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Plots need matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return Figure(figsize=(width, 4.8), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
