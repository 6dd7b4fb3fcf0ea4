"""How far one step goes in each layer."""

from __future__ import annotations

import statistics
from collections.abc import Collection

from lora_da_hf.errors import SolveError
from lora_da_hf.report import LayerReport

_FARTHEST = 100.0
"""How many times as far as the median layer one may go. On SmolLM2-135M the farthest goes 5 times as far."""

_HARDLY = 1e-3

_SMALLEST_UNIT = 1e-150
"""Its square is a number, too."""


def layer_lengths(layers: Collection[LayerReport], *, layer_steps: str) -> dict[str, float]:
    """Return how far layers go beside each other, by name, before one number is chosen for all.

    The Fisher information of a layer is ``T Y (x) S``, with T tokens and the mean factors Y and S. The displacement is
    taken with the means, so a layer goes as far as its displacement over T: experts, an encoder and its decoder, or a
    pooler see different numbers of tokens. A displacement goes as one over the gradient, so a layer whose gradient is
    only rounding, such as the router of a mixture that picks one expert, would go farthest of all. What is more than a
    hundred times the median is taken for that and gets a thousandth of the median.
    """
    if layer_steps == "equal":
        return {layer.name: 1.0 for layer in layers}
    lengths, median = _over_tokens(layers)
    return {name: length if length <= _FARTHEST * median else _HARDLY * median for name, length in lengths.items()}


def _over_tokens(layers: Collection[LayerReport]) -> tuple[dict[str, float], float]:
    lengths = {layer.name: layer.displacement_norm / layer.num_grad_tokens for layer in layers}
    return lengths, statistics.median_high(lengths.values())  # of two layers the longer: nothing tells which is off


def rounding_notes(layers: Collection[LayerReport], *, layer_steps: str) -> list[str]:
    """Return a note for the report if the gradients of some layers seem to be only rounding."""
    lengths, median = _over_tokens(layers)
    found = [name for name, length in lengths.items() if length > _FARTHEST * median]
    if layer_steps == "equal" or not found:
        return []
    return [
        f"{found[0]} and {len(found) - 1} other layers hardly move: their displacements are more than {_FARTHEST:.0f} "
        "times as long as the median layer's, as where a gradient is nothing but rounding"
    ]


def step_unit(layers: Collection[LayerReport], *, layer_steps: str) -> float:
    """Return what all lengths are divided by, so that a step of 1 moves the farthest layer by spectral norm 1.

    The norm is the whole displacement's, of which the subspace keeps a part, so the unit does not depend on the rank.

    Raises:
        SolveError: if they go too far or not far enough for numbers.
    """
    unit = max(layer_lengths(layers, layer_steps=layer_steps).values())
    if not _SMALLEST_UNIT < unit < 1 / _SMALLEST_UNIT:
        raise SolveError(f"The layer that goes farthest would go {unit:.3g} far in one step. Raise the dampings.")
    return unit


def divisors(layers: Collection[LayerReport], unit: float, *, layer_steps: str) -> dict[str, float]:
    """Return what each layer's displacement is divided by once all are solved (`LayerSolution.in_unit`), by name.

    With ``layer_steps="equal"`` it was divided by its norm before. ``unit`` is what `step_unit` returned.
    """
    if layer_steps == "equal":
        return {layer.name: 1.0 for layer in layers}
    lengths = layer_lengths(layers, layer_steps=layer_steps)
    return {layer.name: unit * (layer.displacement_norm / lengths[layer.name]) for layer in layers}
