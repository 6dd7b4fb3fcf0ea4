"""The files of tensors: the basis, the adapter, and the full statistics. Each is read header first."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX, expert_of, holder_of, is_saved
from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.errors import ArtifactError
from lora_da_hf.records import LayerSolution, LayerStatistics, UpperTriangle, is_finite
from lora_da_hf.statistics.taps import input_groups
from lora_da_hf.theory.steps import paper_step_size

TensorSpecs = Mapping[str, tuple[tuple[int, ...], str]]

_HEADER_BYTES = 1 << 20
_HEADER_BYTES_PER_TENSOR = 1 << 10
_INPUT = "input_second_moment"
_MEAN = "input_mean"
_OUTPUT = "output_grad_second_moment_diag"
_GRAD = "weight_grad"
_OF_LAYER = ("A.weight", "B.weight", "B.bias", "embedding_A", "embedding_B", "magnitude_vector")
_TOLERANCE = 1e-4
"""Relative; and four roundings of the adapter's dtype."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, of a kind that transformers reads."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def tensor_specs(path: Path, *, max_tensors: int) -> TensorSpecs:
    """Return what the header of a safetensors file announces, of at most ``max_tensors``."""
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * max_tensors:
                raise SafetensorError("its header is too long")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            specs = {name: (tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()}
        if len(specs) > max_tensors:
            raise SafetensorError(f"it holds {len(specs)} tensors, and at most {max_tensors} can be")
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a valid safetensors file ({error}). Do not use it.") from error
    return specs


def read_tensors(path: Path, expected: TensorSpecs | None) -> dict[str, Tensor]:
    """Read a safetensors file of finite values, whose header was checked if nothing is ``expected``."""
    if expected is not None:
        compare_specs(path, tensor_specs(path, max_tensors=len(expected)), expected)
    with safe_open(path, framework="pt") as file:
        return {name: finite(path, name, file.get_tensor(name)) for name in file.keys()}


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file whose values are finite."""
    if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
        raise ArtifactError(f"{path}: {name} holds NaN or infinity. Do not use it.")
    return tensor


def compare_specs(path: Path, found: TensorSpecs, expected: TensorSpecs) -> None:
    """Refuse a file whose tensors are not exactly those of the manifest, naming the first that differs."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            says, holds = expected.get(name, "not there"), found.get(name, "not there")
            raise ArtifactError(f"{path}: {name[:160]!r} is {holds}, and by the manifest {says}. Do not use it.")


def basis_tensors(solutions: Mapping[str, LayerSolution]) -> dict[str, Tensor]:
    """Return the tensors of the basis file: ``<layer>.basis_A`` and ``<layer>.basis_B`` in float32."""
    named = {f"{n}.{part}": getattr(layer, part) for n, layer in solutions.items() for part in ("basis_A", "basis_B")}
    return {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in named.items()}


def read_solutions(path: Path, manifest: Manifest) -> dict[str, LayerSolution]:
    """Put the solutions together from the basis file and the manifest."""
    shapes = {f"{name}.basis_A": (layer.max_rank, layer.in_features) for name, layer in manifest.layers.items()}
    shapes |= {f"{name}.basis_B": (layer.out_features, layer.max_rank) for name, layer in manifest.layers.items()}
    tensors = read_tensors(path, {key: (shape, "F32") for key, shape in shapes.items()})
    same = ("displacement_norm", "input_damping", "output_damping", "solver", "residual")
    return {
        name: LayerSolution(
            basis_A=tensors[f"{name}.basis_A"],
            basis_B=tensors[f"{name}.basis_B"],
            eigenvalues=torch.tensor(layer.eigenvalues, dtype=torch.float64),
            **{field: getattr(layer, field) for field in same},
        )
        for name, layer in manifest.layers.items()
    }


# ---- the adapter


def factor_key(name: str, factor: str) -> str:
    """Return the key under which PEFT stores a layer's ``"A"`` or ``"B"``; all experts of a parameter have one."""
    return f"{PEFT_PREFIX}{holder_of(name)}.lora_{factor}.weight"


def stored_factor(tensors: Mapping[str, Tensor], name: str, factor: str, rank: int) -> Tensor | None:
    """Return a layer's ``"A"`` or ``"B"`` out of the tensors of an adapter's file; None if it is not there.

    Of experts, PEFT stores all rows of one A together, and the columns of one B apart.
    """
    tensor, index = tensors.get(factor_key(name, factor)), expert_of(name)
    if tensor is None or index is None:
        return tensor
    if factor == "A":
        return tensor[index * rank : (index + 1) * rank]
    return tensor[:, index :: max(tensor.shape[-1] // rank, 1)]


def check_adapter(path: Path, bases: Mapping[str, LayerSolution], config: dict[str, Any], manifest: Manifest) -> None:
    """Verify that ``s B A`` of each layer is the step times the basis at its rank, and that nothing else is there.

    PEFT loads by name whatever it finds: a tensor with the name of a base weight would replace that weight.
    """
    layers = (*manifest.layers, *manifest.report.kept)
    keys = set(tensor_specs(path, max_tensors=4 * len(layers) + 4096))
    tensors = read_tensors(path, None)
    beside = keys - {f"{PEFT_PREFIX}{holder_of(name)}.lora_{end}" for name in layers for end in _OF_LAYER}
    others = {key for key in beside if not _is_trained(key, config)}
    if config["ensure_weight_tying"]:  # PEFT names one of the tied weights, and stores all of them
        trained = {_digest(tensors[key]) for key in beside - others}
        others = {key for key in others if ".lora_" in key or _digest(tensors[key]) not in trained}
    magnitudes = {f"{PEFT_PREFIX}{name}.lora_magnitude_vector" for name in manifest.layers if config["use_dora"]}
    if not magnitudes <= keys:
        raise ArtifactError(f"{path}: {min(magnitudes - keys)[:160]!r} is missing. Do not use it.")
    if others:
        raise ArtifactError(f"{path}: {min(others)[:160]!r} is not a tensor of this adapter. Do not use it.")
    for name, layer in manifest.layers.items():
        factors: list[Tensor] = []
        for factor, shape in (("A", (layer.rank, layer.in_features)), ("B", (layer.out_features, layer.rank))):
            tensor = stored_factor(tensors, name, factor, layer.rank)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ArtifactError(f"{path}: lora_{factor} of {name} is not {list(shape)}. Do not use it.")
            factors.append(tensor)
        step = manifest.report.step_size
        step = paper_step_size(layer.peft_scaling, manifest.config.stable_gamma) if step is None else step
        missed = _missed(factors[0], factors[1], bases[name], scaling=layer.peft_scaling, step=step)
        if not missed <= _TOLERANCE + 4 * max(torch.finfo(tensor.dtype).eps for tensor in factors):
            raise ArtifactError(
                f"{path}: the adapter of {name} is not the step along the stored basis: it misses it by {missed:.1e} "
                "of its size. Do not use it."
            )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _is_trained(key: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the config says that a tensor is trained beside the adapter."""
    name = key.removeprefix(PEFT_PREFIX)
    if name == key or ".lora_" in name:
        return False
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        return bool(config["trainable_token_indices"])
    module, _, parameter = name.rpartition(".")
    return (parameter == "bias" and config["bias"] != "none") or is_saved(config, module)


def _missed(lora_A: Tensor, lora_B: Tensor, basis: LayerSolution, *, scaling: float, step: float) -> float:
    """Return how far ``s B A`` is from ``step * basis_B @ basis_A``, relative to the latter, or A from the basis.

    At step 0 B must be zero, and A is free.
    """
    if step == 0.0:
        return math.inf if lora_B.any() else 0.0
    rank = len(lora_A)
    rows, columns = basis.basis_A[:rank].double(), basis.basis_B[:, :rank].double()
    wide_A, wide_B = lora_A.double(), lora_B.double()
    inside = wide_A @ torch.linalg.pinv(rows)  # rows need not be of norm 1
    outside = (wide_A - inside @ rows).norm() / wide_A.norm()
    expected = columns * step
    along = (scaling * (wide_B @ inside) - expected).norm() / expected.norm()
    return torch.maximum(outside, along).item()  # NaN of either stays


# ---- the statistics


def save_statistics(
    folder: Path,
    statistics: Mapping[str, LayerStatistics],
    shared_inputs: Mapping[str, str],
    *,
    part: int,
    shard_bytes: int = 1 << 30,
) -> None:
    """Write the statistics of one pass as safetensors, whose names sort in their order.

    Keys are ``<layer>.weight_grad [d_out, d_in]``, ``<layer>.output_grad_second_moment_diag [d_out]`` and, once for the
    layers that share an input, ``<leader>.input_second_moment``, its upper triangle row by row, and
    ``<leader>.input_mean [d_in]``. All are means.

    ``shared_inputs`` is the leader of each layer, ``part`` the number of the pass. A file is written as soon as its
    tensors have ``shard_bytes``, so that host memory need not hold all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    for place, (name, layer) in enumerate(statistics.items(), start=1):
        tensors = {_GRAD: layer.weight_grad, _OUTPUT: layer.output_grad_second_moment_diag}
        moment, mean = layer.input_second_moment, layer.input_mean
        if shared_inputs[name] == name and isinstance(moment, UpperTriangle) and mean is not None:  # as a pass has them
            tensors |= {_INPUT: moment.packed(), _MEAN: mean}
        shard |= {f"{name}.{key}": tensor.to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes or place == len(statistics):
            write_tensors(folder / f"{part:05d}-{place:05d}.safetensors", shard)
            shard = {}


def iterate_statistics(folder: Path, manifest: Manifest) -> Iterator[dict[str, LayerStatistics]]:
    """Yield the statistics of a folder that `load_init` checked, by groups of layers that share an input's moment.

    Raises:
        ArtifactError: if they were not stored, or are not finite.
    """
    if not manifest.statistics_files:
        raise ArtifactError(
            f"{folder} lacks the full statistics, which other settings and exports need. Compute it again with "
            "save_statistics=True."
        )
    with opened(folder, manifest.statistics_files) as read:
        for leader, names in input_groups_of(manifest).items():
            upper, width = read(f"{leader}.{_INPUT}"), manifest.layers[leader].in_features
            moment = UpperTriangle(entries=upper, width=width, block=1)
            mean = read(f"{leader}.{_MEAN}")
            yield {
                name: LayerStatistics(
                    input_second_moment=moment,
                    output_grad_second_moment_diag=read(f"{name}.{_OUTPUT}"),
                    weight_grad=read(f"{name}.{_GRAD}"),
                    num_input_tokens=manifest.layers[name].num_tokens,
                    num_output_tokens=manifest.layers[name].num_grad_tokens,
                    input_mean=mean,
                )
                for name in names
            }


@contextlib.contextmanager
def opened(folder: Path, files: Sequence[str]) -> Generator[Callable[[str], Tensor]]:
    """Give what reads a tensor of some files by its name, and refuses one that is not finite."""
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Path, Any]] = {}
        for path in (folder / file for file in files):
            tensors = stack.enter_context(safe_open(path, framework="pt"))
            places |= dict.fromkeys(tensors.keys(), (path, tensors))

        def read(name: str) -> Tensor:
            path, tensors = places[name]
            return finite(path, name, tensors.get_tensor(name))

        yield read


def input_groups_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the layers that share an input, by their leader."""
    return input_groups({name: layer.shares_input_with for name, layer in manifest.layers.items()})


def check_statistics(folder: Path, manifest: Manifest) -> None:
    """Verify keys, shapes and dtypes of the stored statistics, if there are any."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in manifest.layers.items():
        shapes[f"{name}.{_GRAD}"] = (layer.out_features, layer.in_features)
        shapes[f"{name}.{_OUTPUT}"] = (layer.out_features,)
        if layer.shares_input_with == name:
            shapes[f"{name}.{_INPUT}"] = (layer.in_features * (layer.in_features + 1) // 2,)
            shapes[f"{name}.{_MEAN}"] = (layer.in_features,)
    check_parts(folder, manifest.statistics_files, {name: (shape, "F32") for name, shape in shapes.items()})


def check_parts(folder: Path, files: Sequence[str], expected: TensorSpecs) -> None:
    """Verify that some files, if there are any, hold exactly the expected tensors together."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        found |= tensor_specs(folder / file, max_tensors=len(expected))
    if files:
        compare_specs(folder / files[-1], found, expected)
