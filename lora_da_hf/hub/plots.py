"""The plot of an initialisation, from its report alone."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict

import numpy as np

from lora_da_hf.report import LayerReport, LoRADAReport, kind_of


def draw_spectra(report: LoRADAReport) -> bytes:
    """Draw the spectra of the guidance matrices as a PNG.

    Left, for each module type, the gain ``-eigenvalue`` of each stored direction, relative to the layer's first: the
    median over the layers, and their middle half. Right, for each layer, how many directions matter.
    """
    from matplotlib.figure import Figure  # which is optional

    figure = Figure(figsize=(11, 4.8), layout="constrained")
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def directions_that_matter(layer: LayerReport) -> float:
    """Return the sum of a layer's positive gains over the largest; 0 if no direction gains."""
    gains = [-value for value in layer.eigenvalues if value < 0]
    return sum(gains) / max(gains) if gains else 0.0
