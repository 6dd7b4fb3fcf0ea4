"""The experts of a mixture as one linear layer each, though they share parameters with an expert dimension."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_da_hf.statistics.model_state import changed
from lora_da_hf.statistics.token_masks import RoutedTokens


class ExpertLinear(nn.Module):
    """One expert's slice of a parameter ``[experts, d_out, d_in]`` (or transposed), as a layer of its own."""

    experts: Any

    def __init__(self, experts: nn.Module, parameter_name: str, index: int) -> None:
        super().__init__()
        vars(self)["experts"] = experts  # so that torch does not take it for a submodule
        self.parameter_name = parameter_name
        self.index = index
        self.routed_tokens: RoutedTokens | None = None

    @property
    def weight(self) -> Tensor:
        """The slice, ``[d_out, d_in]``."""
        weight = getattr(self.experts, self.parameter_name)[self.index]
        return weight.mT if self.experts.is_transposed else weight

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``[tokens, d_in]`` to ``[tokens, d_out]``."""
        bias = getattr(self.experts, f"{self.parameter_name}_bias", None)
        return linear(rows, self.weight, None if bias is None else bias[self.index])


def why_not_apart(layer: ParamWrapper) -> str | None:
    """Return why the experts of a layer cannot be run one by one, or None if they can."""
    base: Any = layer.get_base_layer()
    what = f"{layer.parameter_name} of {type(base).__name__}"
    if getattr(base, layer.parameter_name).dim() != 3:
        return f"{what} is a parameter and no linear layer"
    if not hasattr(base, "_apply_gate") or layer.parameter_name not in _parameter_names(base):
        return f"{what} is not run by transformers' experts interface"
    if base._is_expert_parallel or getattr(base, "has_post_expert_norm", False):
        return f"{what} is run expert parallel, or with a norm after it"
    if getattr(layer, "_did_swap_in_out_features", False) == base.is_transposed:  # older versions of PEFT
        return f"A of {what} is given by PEFT to the side of its outputs"
    return None


def slice_factors(lora_A: Tensor, lora_B: Tensor, *, rank: int, index: int) -> tuple[Tensor, Tensor]:
    """Return one expert's factors from ``lora_A [experts * r, d_in]`` and ``lora_B [d_out, r * experts]``."""
    count = lora_A.shape[0] // rank
    return lora_A[index * rank : (index + 1) * rank], lora_B[:, index::count]


@contextlib.contextmanager
def experts_apart(layers: Iterable[nn.Module]) -> Generator[None]:
    """Run each expert among the layers by its own `ExpertLinear`, so that it can be tapped like any other layer."""
    linears: dict[nn.Module, dict[tuple[str, int], ExpertLinear]] = {}
    for layer in layers:
        if isinstance(layer, ExpertLinear):
            linears.setdefault(layer.experts, {})[layer.parameter_name, layer.index] = layer
    with changed([(experts, "forward", _forward_by_expert(experts, known)) for experts, known in linears.items()]):
        yield


@contextlib.contextmanager
def experts_skipped(model: nn.Module) -> Generator[None]:
    """Have experts return what they are fed: on the meta device no token can be sent to one of them."""

    def as_fed(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    holders = [module for module in model.modules() if hasattr(module, "num_experts")]
    stacked = [m for m in holders if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    with changed([(module, "forward", as_fed) for module in stacked]):
        yield


def _parameter_names(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _forward_by_expert(experts: Any, known: dict[tuple[str, int], ExpertLinear]) -> Any:
    up_name, down_name = _parameter_names(experts)

    def layer(name: str, index: int) -> ExpertLinear:
        return known.get((name, index)) or ExpertLinear(experts, name, index)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen, order = top_k_index.masked_fill(top_k_weights == 0, experts.num_experts).reshape(-1).sort(stable=True)
        numbers = torch.arange(experts.num_experts, dtype=chosen.dtype, device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True).tolist()  # once a layer: it waits for the GPU
        tokens_of, weights = order // top_k_index.shape[1], top_k_weights.reshape(-1)[order]
        result = torch.zeros_like(hidden_states)
        for index, (start, end) in enumerate(pairwise([0, *ends])):
            if start == end:
                continue
            tokens = tokens_of[start:end]
            up, down = layer(up_name, index), layer(down_name, index)
            up.routed_tokens = down.routed_tokens = RoutedTokens(indices=tokens, count=hidden_states.shape[0])
            rows = up(hidden_states[tokens])
            rows = down(experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows))
            result = result.index_add(0, tokens, (rows * weights[start:end, None]).to(result.dtype))
        return result

    return forward
