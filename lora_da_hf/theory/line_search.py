"""A line search over the step that needs nothing but losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MAX_EVALUATIONS = 24
_SMALLEST = 1e-5
"""Steps below it are not tried."""


@dataclass(frozen=True, kw_only=True)
class LineSearchResult:
    """The best step found, 0 if none is below the loss of no step.

    Attributes:
        evaluations: Every step tried with its loss, in the order they were tried.
        alike: The steps whose losses cannot be told from the lowest one, 0 for no step; the smallest is `step_size`.
    """

    step_size: float
    loss: float
    evaluations: tuple[tuple[float, float], ...]
    alike: tuple[float, ...]


def line_search(
    evaluate: Callable[[float], float],
    *,
    baseline: float,
    start: float = 0.1,
    factor: float = 10**0.5,
    refine: bool = True,
    resolution: float = 0.0,
) -> LineSearchResult:
    """Minimise a loss over a positive step, expanding geometrically until the loss rises on both sides.

    From ``start`` the step grows by ``factor`` while the loss falls, and shrinks while it does not fall below that of
    its right neighbour or of no step. A minimum is refined once, at the vertex of the parabola through three points in
    the logarithm of the step. A loss that is not finite counts as a rise. Of steps whose losses are no farther apart
    than ``resolution`` the smallest is taken, no step included.
    """
    losses: dict[float, float] = {}

    def at(step: float) -> float:
        if step not in losses:
            loss = evaluate(step)
            losses[step] = loss if math.isfinite(loss) else math.inf
        return losses[step]

    low = high = best = start
    at(start)
    while len(losses) < _MAX_EVALUATIONS:
        if best == high and losses[best] < math.inf:
            high *= factor
            at(high)
        elif (best == low or losses[best] >= baseline) and low / factor >= _SMALLEST:
            low /= factor
            at(low)
        else:
            break
        best = min(losses, key=lambda step: (losses[step], step))
    if refine and low < best < high and losses[best] < baseline:
        vertex = _vertex(best, factor, losses)
        if vertex is not None:
            at(vertex)
    readings = {0.0: baseline, **losses}
    lowest = min(readings.values())
    alike = tuple(sorted(step for step, loss in readings.items() if loss <= lowest + resolution)) or (0.0,)
    return LineSearchResult(
        step_size=alike[0],
        loss=readings[alike[0]],
        evaluations=tuple(losses.items()),
        alike=alike,
    )


def _vertex(best: float, factor: float, losses: dict[float, float]) -> float | None:
    """Return the step at the vertex of the parabola through the best step and its neighbours."""
    ordered = sorted(losses)
    place = ordered.index(best)
    left, middle, right = (losses[ordered[place + k]] for k in (-1, 0, 1))
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return None
    shift = 0.5 * (left - right) / curvature
    return best * factor**shift if abs(shift) > 0.1 else None
