"""The norm of a displacement is its largest singular value."""

import pytest
import torch

from lora_da_hf.theory.guidance import Displacement
from lora_da_hf.theory.kronecker import FactorizedInput


def of_matrix(matrix):
    """Return the displacement with identities for both factors."""
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    factorized = FactorizedInput(cholesky=identity, damping=0.0)
    return Displacement(scaled_gradient=matrix, factorized_input=factorized)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 7), (60, 40), (500, 450), (30, 600)])
def test_the_spectral_norm_is_the_largest_singular_value_at_any_scale(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    assert of_matrix(matrix).norm() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-9)
