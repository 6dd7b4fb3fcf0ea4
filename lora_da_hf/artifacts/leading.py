"""The leading directions of the starts beside the stored one, in 8 bits: small enough to publish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.tensors import check_parts, input_groups_of, opened, write_tensors
from lora_da_hf.config import STARTS
from lora_da_hf.records import LayerSolution

_BLOCK = 64
"""Entries that share a scale."""
_NUMBERS = ("displacement_norm", "input_damping", "output_damping", "residual")


def save_leading(folder: Path, solutions: Mapping[str, Mapping[str, LayerSolution]], *, part: int) -> None:
    """Write the directions of some layers and starts as safetensors, whose names sort by ``part``.

    Keys are ``<layer>.<start>.A [max_rank, d_in]`` and ``.B [max_rank, d_out]``, in 8 bits, with a ``_scale`` for each
    64 entries of a row, ``.eigenvalues`` and ``.numbers``. Those of the inputs are their group's and have no B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, starts in solutions.items():
        for start, solution in starts.items():
            key, factors = f"{name}.{start}", {"A": solution.basis_A, "B": solution.basis_B.mT}
            for factor in _factors(start):
                tensors[f"{key}.{factor}"], tensors[f"{key}.{factor}_scale"] = _in_8_bit(factors[factor].cpu())
            tensors[f"{key}.eigenvalues"] = solution.eigenvalues.double().cpu().contiguous()
            numbers = [getattr(solution, field) for field in _NUMBERS]
            tensors[f"{key}.numbers"] = torch.tensor(numbers, dtype=torch.float64)
    write_tensors(folder / f"{part:05d}.safetensors", tensors)


def _factors(start: str) -> str:
    return "A" if start == "inputs" else "AB"


def _in_8_bit(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    scale = blocks.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (blocks / scale[..., None]).round().to(torch.int8).flatten(1)[:, : rows.shape[1]].contiguous(), scale


def read_leading(folder: Path, manifest: Manifest, start: str) -> dict[str, LayerSolution]:
    """Read the directions of a start that is not the stored one, from a folder that `load_init` checked."""
    found: dict[str, LayerSolution] = {}
    with opened(folder, manifest.leading_files) as read:

        def rows(key: str) -> Tensor:
            entries, scale = read(key).float(), read(f"{key}_scale").repeat_interleave(_BLOCK, dim=1)
            return entries * scale[:, : entries.shape[1]]

        for name, layer in manifest.layers.items():
            key = f"{layer.shares_input_with if start == 'inputs' else name}.{start}"
            basis_A = torch.nn.functional.normalize(rows(f"{key}.A")[: layer.max_rank], dim=1)
            columns = rows(f"{key}.B").mT.contiguous() if "B" in _factors(start) else None
            found[name] = LayerSolution(
                basis_A=basis_A,
                basis_B=basis_A.new_zeros(layer.out_features, len(basis_A)) if columns is None else columns,
                eigenvalues=read(f"{key}.eigenvalues")[: layer.max_rank],
                solver="stored in 8 bits",
                **dict(zip(_NUMBERS, read(f"{key}.numbers").tolist(), strict=True)),
            )
    return found


def check_leading(folder: Path, manifest: Manifest) -> None:
    """Verify keys, shapes and dtypes of the stored directions, if there are any."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for leader, names in input_groups_of(manifest).items():
        layers = {name: manifest.layers[name] for name in names}
        keys = [(name, start, layers[name].max_rank) for name in names for start in STARTS if start != "inputs"]
        keys.append((leader, "inputs", max(layer.max_rank for layer in layers.values())))
        for name, start, rank in (key for key in keys if key[1] != manifest.config.start):
            widths = {"A": layers[name].in_features, "B": layers[name].out_features}
            for factor in _factors(start):
                expected[f"{name}.{start}.{factor}"] = ((rank, widths[factor]), "I8")
                expected[f"{name}.{start}.{factor}_scale"] = ((rank, -(-widths[factor] // _BLOCK)), "F32")
            expected[f"{name}.{start}.eigenvalues"] = ((rank,), "F64")
            expected[f"{name}.{start}.numbers"] = ((len(_NUMBERS),), "F64")
    check_parts(folder, manifest.leading_files, expected)
