"""The same choice of a subspace, measured in the Fisher norm: what the loss of the displacement is, not its length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da_hf.theory.displacement import Displacement
from lora_da_hf.theory.kronecker import FactorizedInput


@dataclass(frozen=True, kw_only=True)
class WhitenedLayer:
    """A layer in coordinates in which its Fisher information is the identity.

    With ``Z = L L^T`` and ``Y = diag(inverse_output)^-1``, a matrix W of weights becomes ``Y^1/2 W L``, whose Frobenius
    norm is the Fisher norm of W: twice the loss that it costs, to second order. The displacement becomes
    ``- diag(inverse_output)^1/2 weight_grad L^-T``, and the covariance of its estimate the identity over N.

    Attributes:
        displacement: In these coordinates.
        inverse_output: ``[d_out]``, of the layer as it is.
        factorized_input: ``L``, of the layer as it is.
    """

    displacement: Displacement
    inverse_output: Tensor
    factorized_input: FactorizedInput

    @classmethod
    def of(cls, weight_grad: Tensor, inverse_output: Tensor, factorized_input: FactorizedInput) -> WhitenedLayer:
        """Make it from ``weight_grad [d_out, d_in]`` and the two damped factors, all in one dtype."""
        cholesky = factorized_input.cholesky
        scaled = inverse_output.sqrt()[:, None] * weight_grad
        whitened = torch.linalg.solve_triangular(cholesky, scaled.mT, upper=False).mT.contiguous()
        return cls(
            displacement=Displacement(scaled_gradient=whitened, factorized_input=None),
            inverse_output=inverse_output,
            factorized_input=factorized_input,
        )

    @property
    def inverse_output_factor(self) -> Tensor:
        """The inverse output factor in these coordinates: ones, ``[d_out]``."""
        return torch.ones_like(self.inverse_output)

    def map_back(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map directions back: ``D L V V^T L^-1 = basis_B @ basis_A``, the displacement projected in the Fisher norm.

        Args:
            vectors: V, ``[d_in, r]``, orthonormal in these coordinates.

        Returns:
            ``basis_A [r, d_in]`` with rows of norm 1, which are orthogonal under Z and not otherwise; and ``basis_B
            [d_out, r]``. The first columns give the product for a smaller rank.
        """
        directions = torch.linalg.solve_triangular(self.factorized_input.cholesky.mT, vectors, upper=True)
        lengths = directions.norm(dim=0)
        images = self.inverse_output.sqrt()[:, None] * self.displacement.apply(vectors)
        return (directions / lengths).mT.contiguous(), images * lengths
