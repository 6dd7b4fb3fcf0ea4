"""A line search over the step that needs nothing but losses, and how sure those are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MAX_EVALUATIONS = 24
_SMALLEST = 1e-5
"""Steps below it are not tried."""


@dataclass(frozen=True)
class Losses:
    """A mean loss, by batches, or samples, that are the same ones in the same order at each measurement.

    Attributes:
        batches: Of each its summed loss, and the number of items that it sums over.
    """

    batches: tuple[tuple[float, int], ...]

    @property
    def mean(self) -> float:
        """The loss of an item, NaN if there is none."""
        total, count = (sum(column) for column in zip((0.0, 0), *self.batches, strict=True))
        return total / count if count else math.nan

    def error_beside(self, other: Losses) -> float:
        """Return the standard error of the difference of two means, by how it varies over batches: of one, infinity."""
        difference, number = self.mean - other.mean, len(self.batches)
        if not math.isfinite(difference):
            return 0.0
        if number < 2:
            return math.inf
        count = sum(items for _, items in self.batches)
        pairs = zip(self.batches, other.batches, strict=True)
        squares = sum((here - there - difference * items) ** 2 for (here, items), (there, _) in pairs)
        return math.sqrt(squares * number / (number - 1)) / count


@dataclass(frozen=True, kw_only=True)
class LineSearchResult:
    """The step taken, 0 if none earned its length.

    Attributes:
        evaluations: Every step tried with its loss, in the order they were tried.
    """

    step_size: float
    loss: float
    evaluations: tuple[tuple[float, float], ...]


def line_search(
    evaluate: Callable[[float], Losses],
    *,
    baseline: Losses,
    start: float = 0.1,
    factor: float = 10**0.5,
    refine: bool = True,
) -> LineSearchResult:
    """Minimise a loss over a positive step, expanding geometrically until the loss rises on both sides.

    From ``start`` the step grows by ``factor`` while the loss falls, and shrinks while it does not fall below that of
    its right neighbour or of no step. A bracketed minimum is refined once, at the vertex of the parabola through the
    three points in the logarithm of the step. A loss that is not finite counts as a rise.

    The smallest step is taken whose loss is above the lowest by no more than the standard error of the difference: a
    longer way has to earn its length. No step counts as one of length 0.
    """
    found: dict[float, Losses] = {0.0: baseline}
    losses: dict[float, float] = {}

    def at(step: float) -> None:
        if step not in losses:
            found[step] = evaluate(step)
            losses[step] = found[step].mean if math.isfinite(found[step].mean) else math.inf

    low = high = best = start
    at(start)
    while len(losses) < _MAX_EVALUATIONS:
        if best == high and losses[best] < math.inf:
            high *= factor
            at(high)
        elif (best == low or losses[best] >= baseline.mean) and low / factor >= _SMALLEST:
            low /= factor
            at(low)
        else:
            break
        best = min(losses, key=lambda step: (losses[step], step))
    if refine and low < best < high and losses[best] < baseline.mean:
        ordered = sorted(losses)  # the vertex of the parabola through the best step and its neighbours
        left, middle, right = (losses[ordered[ordered.index(best) + k]] for k in (-1, 0, 1))
        curvature = left - 2 * middle + right
        shift = 0.5 * (left - right) / curvature if math.isfinite(curvature) and curvature > 0 else 0.0
        if abs(shift) > 0.1:
            at(best * factor**shift)
    readings = {0.0: baseline.mean, **losses}
    lowest = min(readings, key=lambda step: (readings[step], step))
    slack = {step: found[step].error_beside(found[lowest]) for step in readings}
    taken = min((step for step in readings if readings[step] <= readings[lowest] + slack[step]), default=0.0)
    return LineSearchResult(step_size=taken, loss=readings[taken], evaluations=tuple(losses.items()))
