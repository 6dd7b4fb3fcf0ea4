"""Plots of an initialisation, from its report alone: the guidance spectra, and the search for the step."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from typing import Any

import numpy as np

from lora_da_hf.artifacts.folders import SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.report import LayerReport, LoRADAReport, kind_of


def draw_plots(report: LoRADAReport) -> dict[str, bytes]:
    """Draw the spectra, and the search if there was one, as PNG files by name. This needs matplotlib."""
    plots = {SPECTRA_PLOT: draw_spectra(report)}
    if report.search and report.search_loss_before is not None:
        plots[SEARCH_PLOT] = draw_search(report)
    return plots


def draw_spectra(report: LoRADAReport) -> bytes:
    """Draw the spectra of the guidance matrices as a PNG.

    Left, for each module type, the gain ``-eigenvalue`` of each stored direction, relative to the layer's first: the
    median over the layers, and their middle half. Right, for each layer, how many directions matter.
    """
    figure = _figure(11)
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        groups[kind_of(layer.name)].append(layer)
    for number, (label, layers) in enumerate(groups.items()):
        gains = [[-value / (abs(layer.eigenvalues[0]) or 1.0) for value in layer.eigenvalues] for layer in layers]
        columns = np.array(list(itertools.zip_longest(*gains, fillvalue=np.nan)))
        low, middle, high = np.nanquantile(columns, [0.25, 0.5, 0.75], axis=1)
        left.plot(range(1, len(columns) + 1), middle, color=f"C{number}", label=label, marker=".")
        left.fill_between(range(1, len(columns) + 1), low, high, color=f"C{number}", alpha=0.12, lw=0)
        numbers = [re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", layer.name) for layer in layers]  # of the blocks
        depths = [int(found[1]) if found else 0 for found in numbers]
        right.plot(depths, [directions_that_matter(layer) for layer in layers], color=f"C{number}", marker=".", lw=1)
    left.axhline(0, color="black", lw=0.8)
    left.set(title="Guidance spectra by module type", xlabel="direction", ylabel="gain relative to the first direction")
    right.set(title="Directions that matter, by layer", xlabel="layer", ylabel="sum of gains / largest gain")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(groups), 8), frameon=False)
    return _png(figure)


def draw_search(report: LoRADAReport) -> bytes:
    """Draw the losses of the steps that the line search tried as a PNG."""
    figure = _figure(7)
    axes = figure.subplots()
    tried = sorted((step, loss) for step, loss in report.search if loss is not None)
    losses = [loss for _, loss in tried]
    axes.plot([step for step, _ in tried], losses, marker="o", label="steps tried")
    before = report.search_loss_before
    if before is not None:
        axes.axhline(before, color="grey", ls="--", label=f"base model ({before:.4f})")
        lowest, highest = min([*losses, before]), max([*losses, before])
        gain = max(before - lowest, 0.01 * abs(before), 1e-6)
        axes.set_ylim(lowest - 0.2 * gain, min(highest, before + 2 * gain) + 0.2 * gain)  # much too large steps are cut
    if report.step_size and report.search_loss_after is not None:
        label = f"chosen: {report.step_size:.3g} ({report.search_loss_after:.4f})"
        axes.plot([report.step_size], [report.search_loss_after], "*", ms=14, color="tab:orange", label=label)
    failed = [step for step, loss in report.search if loss is None]
    if failed:
        axes.vlines(failed, *axes.get_ylim(), colors="tab:red", linestyles=":", label="no loss")
    loss_of = f"mean loss on {report.num_search_samples} search samples"
    axes.set(title="Search for the step", xlabel="step size", ylabel=loss_of, xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def directions_that_matter(layer: LayerReport) -> float:
    """Return the sum of a layer's positive gains over the largest; 0 if no direction gains."""
    gains = [-value for value in layer.eigenvalues if value < 0]
    return sum(gains) / max(gains) if gains else 0.0


def _figure(width: float) -> Any:
    from matplotlib.figure import Figure  # which is optional

    return Figure(figsize=(width, 4.8), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
