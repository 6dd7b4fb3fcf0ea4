"""The two Kronecker factors of the Fisher information of one linear layer, damped and factorised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_hf.config import Damping
from lora_da_hf.errors import NonFiniteError, SolveError
from lora_da_hf.records import UpperTriangle, is_finite

_MAX_DAMPING_RAISES = 12
_RAISE = 10.0


def damping_value(damping: Damping, diagonal: Tensor) -> float:
    """Turn a damping rule into the number that is added to a factor's ``diagonal [d]``, a mean over tokens."""
    if damping.reference == "mean":
        return damping.amount * diagonal.double().mean().item()
    if damping.reference == "median":
        return damping.amount * diagonal.double().median().item()
    return damping.amount


@dataclass(frozen=True, kw_only=True)
class FactorizedInput:
    """The lower Cholesky factor ``[d_in, d_in]`` of the damped ``Z = moment + damping * I``, and how it came about."""

    cholesky: Tensor
    damping: float
    notes: tuple[str, ...] = ()

    def solve(self, right_hand_side: Tensor) -> Tensor:
        """Return ``Z^-1 X`` for ``X [d_in, k]``."""
        # twice as fast for a few columns as cholesky_solve, which copies the factor
        half = torch.linalg.solve_triangular(self.cholesky, right_hand_side, upper=False)
        return torch.linalg.solve_triangular(self.cholesky.mT, half, upper=True)


def in_float64(moment: Tensor | UpperTriangle) -> Tensor:
    """Return a copy of a whole or half symmetric matrix as a whole one in float64."""
    if isinstance(moment, UpperTriangle):
        return moment.full(torch.float64)
    return moment.to(torch.float64, copy=True)


def factorize_input(input_second_moment: Tensor | UpperTriangle, damping: Damping, *, layer: str) -> FactorizedInput:
    """Factorise the damped input second moment in float64, raising the damping until it can be done.

    A factorisation counts as failed if LAPACK says so, or if a solve with it misses its right-hand side by more than
    1e-3 relative. ``input_second_moment [d_in, d_in]`` is the mean of ``x x^T`` over tokens, symmetric, whole or half.

    Raises:
        NonFiniteError: if the moment is not finite.
        SolveError: if twelve tenfold raises of the damping do not help.
    """
    damped = in_float64(input_second_moment)
    if not is_finite(damped):
        raise NonFiniteError(
            f"The input second moment of {layer} is not finite: its inputs overflowed or are NaN. Check the model and "
            "the data, or run the statistics in a wider dtype."
        )
    diagonal = damped.diagonal().clone()
    amount = damping_value(damping, diagonal)
    floor = max(amount, torch.finfo(torch.float64).eps * diagonal.mean().item())
    notes: list[str] = []
    for tried in (amount, *(floor * _RAISE**k for k in range(1, _MAX_DAMPING_RAISES + 1))):
        damped.diagonal().copy_(diagonal + tried)
        cholesky, info = torch.linalg.cholesky_ex(damped)
        factorized = FactorizedInput(cholesky=cholesky, damping=tried, notes=tuple(notes))
        if not info.item() and _solves(factorized, damped):
            return factorized
        why = f"failed at pivot {info.item()}" if info.item() else "was inaccurate"
        notes.append(f"Cholesky with damping {tried:.2g} {why}")
    raise SolveError(
        f"The input second moment of {layer}, {list(damped.shape)}, cannot be factorised ({notes[-1]}). "
        "Raise input_damping or collect more samples."
    )


def _solves(factorized: FactorizedInput, damped: Tensor) -> bool:
    target = torch.ones(damped.shape[0], 1, dtype=damped.dtype, device=damped.device)
    target[1::2] = -1.0
    error = damped @ factorized.solve(target) - target
    return is_finite(error) and error.norm().item() <= 1e-3 * target.norm().item()


def inverse_output_factor(
    output_grad_second_moment_diag: Tensor, damping: Damping, *, layer: str
) -> tuple[Tensor, float]:
    """Return ``1 / (diagonal + damping)``, ``[d_out]``, and the damping that was added.

    Raises:
        SolveError: if an undamped entry is zero.
    """
    amount = damping_value(damping, output_grad_second_moment_diag)
    damped = output_grad_second_moment_diag + amount
    if not (damped > 0).all():
        raise SolveError(
            f"The output-gradient second moment of {layer} has a zero entry and the output damping is {amount:.2g}, so "
            "it has no inverse. Raise output_damping."
        )
    return damped.reciprocal(), amount
