"""How far one step goes in each layer, and how long the rows of its A are."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from lora_da_hf.errors import SolveError
from lora_da_hf.records import LayerSolution, LayerStatistics
from lora_da_hf.theory.adapter_factors import DEFAULT_ROW_NORM

_SMALLEST_UNIT = 1e-150
"""Its square is a number, too."""


def step_unit(solutions: Collection[LayerSolution], *, layer_steps: str) -> float:
    """Return what all displacements are divided by, so that a step of 1 moves the farthest layer by spectral norm 1.

    The norm is the whole displacement's, of which the subspace keeps a part; so the unit depends on no rank, and on no
    weight of bias and variance. With ``"quadratic"`` it is that of the update at the rank that was solved, on which
    the layer's own length depends too. It is 1 with ``"equal"``, where each displacement is divided by its own norm.
    In the units of the statistics a good step would be any number: on SmolLM2-135M about 4e-8.

    Args:
        solutions: Of all layers, as they are solved: one at a time, without a look at the others.
        layer_steps: As in the config.

    Raises:
        SolveError: if the norms are too small or too large to be divided by.
    """
    if layer_steps == "equal":
        return 1.0
    if layer_steps == "quadratic":
        unit = max(solution.spectral_norm() for solution in solutions)
    else:
        unit = max(solution.displacement_norm for solution in solutions)
    if not _SMALLEST_UNIT < unit < 1 / _SMALLEST_UNIT:
        raise SolveError(f"The layer that goes farthest would go {unit:.3g} far in one step. Raise the dampings.")
    return unit


def quadratic_length(statistics: LayerStatistics, basis_A: Tensor, basis_B: Tensor, *, layer: str) -> float:
    """Return the multiple of the update ``U = basis_B @ basis_A`` that minimises the quadratic model of the loss.

    The model is ``<G, U> + T/2 tr(U^T Y U S)``, with the gradient G, the mean factors Y (a diagonal) and S without
    damping, and T tokens: their product is the Fisher information but for a number that all layers share. So lengths
    of layers compare, and the one step for all of them, found by a search, is left to say how large they are. Layers
    are taken for independent.

    Args:
        statistics: Of the layer.
        basis_A: ``[r, d_in]``.
        basis_B: ``[d_out, r]``.
        layer: Its name, for the message.

    Raises:
        SolveError: if the loss does not fall along the update, or the model has no curvature there.
    """
    gradient, moment = (part.to(basis_A) for part in (statistics.weight_grad, statistics.input_second_moment))
    outputs = basis_B.mT @ (statistics.output_grad_second_moment_diag.to(basis_B)[:, None] * basis_B)
    slope = (basis_B * (gradient @ basis_A.mT)).sum().item()
    curvature = statistics.num_output_tokens * (outputs * (basis_A @ moment @ basis_A.mT)).sum().item()
    if not (slope < 0 < curvature and math.isfinite(curvature)):
        raise SolveError(
            f"{layer}: the loss has slope {slope:.3g} and curvature {curvature:.3g} along its update, which gives no "
            "length. Use another layer_steps, or more samples."
        )
    return -slope / curvature


def row_scale(statistics: LayerStatistics, basis_A: Tensor, projected_rms: float, *, layer: str) -> float:
    """Return what ``basis_A`` is multiplied with so that ``A x`` has a given root mean square over rows and tokens.

    Under ``factor_split="default_norm"``, which multiplies the rows of ``basis_A`` with PEFT's default norm. One number
    for all rows: a scale for each would whiten, which blows up directions in which the input hardly varies.

    Args:
        statistics: Of the layer.
        basis_A: ``[r, d_in]``; all its rows count.
        projected_rms: What is wanted.
        layer: Its name, for the message.

    Raises:
        SolveError: if the input does not vary along any row.
    """
    moment = statistics.input_second_moment.to(basis_A)
    mean_square = ((basis_A @ moment) * basis_A).sum().item() / basis_A.shape[0]
    if not 0 < mean_square < math.inf:
        raise SolveError(
            f"{layer}: its input has the mean square {mean_square:.3g} along the rows of A, so no norm gives A x the "
            "projected_rms. Leave projected_rms out."
        )
    return projected_rms / (DEFAULT_ROW_NORM * math.sqrt(mean_square))
