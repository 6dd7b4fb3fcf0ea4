"""The checks that need more than one file: basis, adapter and report must tell one story."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.basis import StoredBasis
from lora_da_hf.artifacts.other_tensors import MAGNITUDE, check_other_tensors
from lora_da_hf.artifacts.peft_config import expert_of, holder_of
from lora_da_hf.artifacts.schema import LayerEntry, Manifest
from lora_da_hf.artifacts.stored_report import read_report
from lora_da_hf.artifacts.strict_json import malformed
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ArtifactError, SolveError
from lora_da_hf.report import LayerReport, LoRADAReport
from lora_da_hf.theory.adapter_factors import paper_step_size
from lora_da_hf.theory.layer_scales import step_unit

_BASIS_TOLERANCE = 1e-4
_EIGENVALUE_TOLERANCE = 1e-3
_ADAPTER_TOLERANCE = 1e-4
"""Relative; and four roundings of the adapter's dtype."""
_SUM_TOLERANCE = 1e-7
_NORM_TOLERANCE = 1e-2
_REPORTED = ("rank", "peft_scaling", "num_tokens", "num_grad_tokens", "input_damping", "output_damping")
_COUNTS = ("num_samples", "num_unlabelled", "num_search_samples", "population_size")


def basis_sums(name: str, basis: StoredBasis) -> tuple[Tensor, Tensor]:
    """Return a weighted sum of each row of ``basis_A`` and of each column of ``basis_B``, as they are stored.

    The weights are from 1 to 2, and follow from the layer's name alone: an entry that is changed, a sign, another
    order, and the basis of another layer all show.

    Args:
        name: The layer.
        basis: Its basis.

    Returns:
        ``[max_rank]`` twice, in float64.
    """
    rows, columns = (basis.to("cpu", torch.float32).double() for basis in (basis.basis_A, basis.basis_B.mT))
    return rows @ _weights_from(f"{name}.A", rows.shape[1]), columns @ _weights_from(f"{name}.B", columns.shape[1])


def _weights_from(text: str, count: int) -> Tensor:
    digest = bytearray(hashlib.shake_256(text.encode()).digest(4 * count))
    return 1.5 + torch.frombuffer(digest, dtype=torch.int32).double() / 2**32


def check_bases(path: Path, bases: Mapping[str, StoredBasis], manifest: Manifest) -> None:
    """Verify that rows are orthonormal, eigenvalues ascend, and that none promises more than its direction gives.

    The guidance matrix is a positive semidefinite term minus ``bias_weight D^T D``, so an eigenvalue is never below
    ``-bias_weight |D v|**2``, and ``D v`` is a column of ``basis_B``. One step moves no layer by a spectral norm above
    1. Under ``metric="fisher"`` rows have norm 1 and need not be orthogonal, and lengths are measured with the output
    factor, which is not stored: that the eigenvalues ascend is all there is to check then.

    Args:
        path: The basis file, for messages.
        bases: By layer.
        manifest: Of the folder.

    Raises:
        ArtifactError: naming the layer.
    """
    config = LoRADAConfig.from_dict(manifest.config)
    in_weights = config.metric == "weights"
    for name, basis in bases.items():
        rows, columns = basis.basis_A.double(), basis.basis_B.double()
        if config.projected_rms is not None:  # the layer's own norm, which B makes up for
            norm = rows[0].norm()
            rows, columns = rows / norm, columns * norm
        gram = rows @ rows.mT
        off = gram - torch.eye(len(rows), dtype=gram.dtype) if in_weights else gram.diagonal() - 1
        if not off.abs().max() <= _BASIS_TOLERANCE:
            kind = "orthonormal" if in_weights else "of norm 1"
            raise ArtifactError(f"{path}: the rows of basis_A of {name} are not {kind}. Fetch it again.")
        values = basis.eigenvalues
        if (values.diff() < 0).any():
            raise ArtifactError(f"{path}: the eigenvalues of {name} do not ascend. Fetch it again.")
        if not in_weights:
            continue
        explained = config.bias_weight * columns.square().sum(dim=0)
        scale = values.abs().max().item()
        if (-values - explained > _EIGENVALUE_TOLERANCE * scale).any():
            raise ArtifactError(f"{path}: basis_B of {name} does not explain its eigenvalues. Fetch it again.")
        largest = torch.linalg.eigvalsh(columns.mT @ columns)[-1].item()
        if largest > 1 + _EIGENVALUE_TOLERANCE:
            raise ArtifactError(f"{path}: one step moves {name} by a spectral norm above 1. Fetch it again.")


def check_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    bases: Mapping[str, StoredBasis],
    config: dict[str, Any],
    manifest: Manifest,
) -> None:
    """Verify that ``s B A`` of each layer is the step times the basis at its rank, and the rest what PEFT starts with.

    Args:
        path: The adapter's file, for messages.
        tensors: Its tensors, finite ones.
        bases: By layer, checked.
        config: The checked adapter config.
        manifest: Of the folder.

    Raises:
        ArtifactError: naming the tensor.
    """
    known: set[str] = set()
    for name, layer in manifest.layers.items():
        factors: list[Tensor] = []
        for factor, shape in (("A", (layer.rank, layer.in_features)), ("B", (layer.out_features, layer.rank))):
            tensor = stored_factor(tensors, name, factor, layer.rank)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                found = "missing" if tensor is None else f"{list(tensor.shape)}"
                raise ArtifactError(
                    f"{path}: lora_{factor} of {name} is {found}, not {list(shape)} as the manifest says. "
                    "Fetch it again."
                )
            known.add(_key(name, factor))
            factors.append(tensor)
        if config.get("use_dora"):
            _check_magnitude(path, tensors, name, layer)
        missed = _missed(factors[0], factors[1], bases[name], layer, _step(manifest, layer))
        tolerance = _ADAPTER_TOLERANCE + 4 * max(torch.finfo(tensor.dtype).eps for tensor in factors)
        if not missed <= tolerance:
            raise ArtifactError(
                f"{path}: the adapter of {name} is not the step of the manifest along the stored basis: it misses it "
                f"by {missed:.1e} of its size. Fetch it again."
            )
    check_other_tensors(path, tensors, known, config, manifest)


def _check_magnitude(path: Path, tensors: Mapping[str, Tensor], name: str, layer: LayerEntry) -> None:
    tensor = tensors.get(f"{PEFT_PREFIX}{name}{MAGNITUDE}")
    if tensor is None or tensor.numel() != layer.out_features:
        raise malformed(f"{path}: DoRA's magnitude of {name} is missing or of another size")


def stored_factor(tensors: Mapping[str, Tensor], name: str, factor: str, rank: int) -> Tensor | None:
    """Return a layer's A or B out of the tensors of an adapter's file; None if it is not there.

    Args:
        tensors: Of the file.
        name: The layer.
        factor: ``"A"`` or ``"B"``.
        rank: Of the layer.
    """
    tensor = tensors.get(_key(name, factor))
    if tensor is not None and holder_of(name) != name:
        return _of_expert(tensor, factor, rank, expert_of(name))
    return tensor


def _key(name: str, factor: str) -> str:
    return f"{PEFT_PREFIX}{holder_of(name)}.lora_{factor}.weight"


def _of_expert(tensor: Tensor, factor: str, rank: int, index: int) -> Tensor:
    """Return one expert's part of the factor of all experts, which PEFT stores by rows of A and columns of B."""
    if factor == "A":
        return tensor[index * rank : (index + 1) * rank]
    return tensor[:, index :: max(tensor.shape[-1] // rank, 1)]


def _step(manifest: Manifest, layer: LayerEntry) -> float:
    if manifest.step_size is None:
        return paper_step_size(layer.peft_scaling, LoRADAConfig.from_dict(manifest.config).stable_gamma)
    return manifest.step_size


def _missed(lora_A: Tensor, lora_B: Tensor, basis: StoredBasis, layer: LayerEntry, step: float) -> float:
    """Return how far ``s B A`` is from ``step * basis_B @ basis_A``, relative to the latter.

    Of a step of 0, any B that is not zero misses it wholly, and so does an A outside of the basis at every step.
    """
    rows = basis.basis_A[: layer.rank].double()
    columns = basis.basis_B[:, : layer.rank].double()
    wide_A, wide_B = lora_A.double(), lora_B.double()
    inside = wide_A @ torch.linalg.pinv(rows)  # rows are not orthogonal in every metric
    outside = (wide_A - inside @ rows).norm() / wide_A.norm()
    if step == 0.0:
        return math.inf if wide_B.any() else outside.item()
    expected = columns * step
    along = (layer.peft_scaling * (wide_B @ inside) - expected).norm() / expected.norm()
    return torch.maximum(outside, along).item()  # NaN of either stays


def check_report(path: Path, bases: Mapping[str, StoredBasis], manifest: Manifest) -> LoRADAReport:
    """Read the report, and verify that it says of settings, data, layers and steps what manifest and basis say.

    Args:
        path: The report's file, whose hash was compared already.
        bases: By layer.
        manifest: Of the folder.

    Raises:
        ArtifactError: naming the first thing that they disagree on.
    """
    report = read_report(path, manifest)
    layers = report.layers
    steps = {str(rank): step for rank, step in report.step_size_by_rank.items()}
    facts = {
        "config": (report.config, manifest.config),
        "step_size": (report.step_size, manifest.step_size),
        "step_size_by_rank": (steps, manifest.step_size_by_rank),
        "kept": (report.kept, manifest.kept),
        "data_fingerprint": (report.data_fingerprint, manifest.data["fingerprint"]),
        "layers": (sorted(layer.name for layer in layers), sorted(manifest.layers)),
        **{name: (getattr(report, name), manifest.data[name]) for name in _COUNTS},
    }
    for layer in layers:
        if layer.name in manifest.layers:
            facts |= _layer_facts(layer, manifest.layers[layer.name], bases[layer.name])
            _check_sums(path, layer, bases[layer.name])
            _check_update_norm(path, layer, bases[layer.name], _step(manifest, manifest.layers[layer.name]))
    for what, (found, expected) in facts.items():
        if found != expected:
            raise malformed(f"{path} contradicts the manifest or the basis: {what} is {str(found)[:80]!r} there")
    sizes = [size for layer in layers for size in (layer.residual, layer.update_norm)]
    if not min(layer.displacement_norm for layer in layers) > 0:
        raise ArtifactError(f"{path}: the norm of a displacement is not above 0. Fetch it again.")
    try:
        unit = step_unit(layers, layer_steps=LoRADAConfig.from_dict(manifest.config).layer_steps)
    except SolveError:
        unit = None
    if report.step_unit != unit:
        raise ArtifactError(
            f"{path}: the unit of steps, {report.step_unit:.6g}, is not that of the norms there. Fetch it again."
        )
    if min(*sizes, *report.seconds.values(), report.num_unseen_samples, report.batch_size - 1) < 0:
        raise ArtifactError(f"{path}: a count, a time, a norm or a residual is negative. Fetch it again.")
    return report


def _check_sums(path: Path, report: LayerReport, basis: StoredBasis) -> None:
    sums = basis_sums(report.name, basis)
    lengths = (basis.basis_A.double().norm(dim=1), basis.basis_B.double().norm(dim=0))
    widths = (basis.basis_A.shape[1], basis.basis_B.shape[0])
    for found, expected, length, width in zip(
        (report.basis_A_sums, report.basis_B_sums), sums, lengths, widths, strict=True
    ):
        tolerance = _SUM_TOLERANCE * math.sqrt(width) * length.cpu()
        if (
            len(found) != len(expected)
            or ((torch.tensor(found, dtype=torch.float64) - expected).abs() > tolerance).any()
        ):
            raise ArtifactError(
                f"{path} has other sums over the basis of {report.name} than the stored one. Fetch it again."
            )


def _check_update_norm(path: Path, report: LayerReport, basis: StoredBasis, step: float) -> None:
    """Verify the norm of the step along the basis, as far as an adapter in half precision keeps to it."""
    rows, columns = basis.basis_A[: report.rank].double(), basis.basis_B[:, : report.rank].double()
    squared = ((columns.mT @ columns) * (rows @ rows.mT)).sum().item()
    expected = step * math.sqrt(max(squared, 0.0))
    if not math.isclose(report.update_norm, expected, rel_tol=_NORM_TOLERANCE):
        raise ArtifactError(
            f"{path} says that the update of {report.name} has norm {report.update_norm:.4g}, and along the stored "
            f"basis it has {expected:.4g}. Fetch it again."
        )


def _layer_facts(report: LayerReport, entry: LayerEntry, basis: StoredBasis) -> dict[str, tuple[Any, Any]]:
    stored = basis.eigenvalues.tolist()
    facts: dict[str, tuple[Any, Any]] = {
        f"{what} of {report.name}": (getattr(report, what), getattr(entry, what)) for what in _REPORTED
    }
    return {**facts, f"eigenvalues of {report.name}": (report.eigenvalues[: len(stored)], stored)}
