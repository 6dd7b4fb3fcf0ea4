"""Ranks per layer, under a budget for all of them together."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from lora_da_hf.errors import ConfigError


def num_adapter_parameters(ranks: Mapping[str, int], widths: Mapping[str, tuple[int, int]]) -> int:
    """Return the size of A and B of all layers, ``sum r (d_in + d_out)``, for ranks and widths by layer."""
    return sum(rank * sum(widths[name]) for name, rank in ranks.items())


def allocate_ranks(
    eigenvalues: Mapping[str, Sequence[float]],
    widths: Mapping[str, tuple[int, int]],
    budget: int,
) -> dict[str, int]:
    """Spend a budget of parameters where each lowers the objective most.

    Rank r + 1 of a layer lowers ``trace(Q^T G Q)`` by ``-eigenvalues[r]`` and costs ``d_in + d_out`` parameters. Ranks
    are added one at a time, the one with the largest decrease per parameter first, the earlier of equals, while they
    fit. Eigenvalues ascend, so no other choice is better by more than the first direction that did not fit. One whose
    eigenvalue is not negative adds more variance than it takes bias away, and is never bought. Each layer gets rank 1.

    Eigenvalues compare across layers with ``layer_steps="displacement"`` alone.

    Raises:
        ConfigError: if the budget does not buy rank 1 in each layer.
    """
    most = {name: len(values) for name, values in eigenvalues.items()}
    ranks = dict.fromkeys(most, 1)
    left = budget - num_adapter_parameters(ranks, widths)
    if left < 0:
        least, all_of_it = num_adapter_parameters(ranks, widths), num_adapter_parameters(most, widths)
        raise ConfigError(
            f"A rank budget of {budget} parameters is too small: rank 1 in each of the {len(ranks)} layers takes "
            f"{least}, and all that is stored {all_of_it}. Give a number between."
        )

    def offer(name: str) -> tuple[float, int, str]:
        return eigenvalues[name][ranks[name]] / sum(widths[name]), order[name], name

    order = {name: place for place, name in enumerate(ranks)}
    offers = [offer(name) for name in ranks if ranks[name] < most[name]]
    heapq.heapify(offers)
    while offers:
        change, _, name = heapq.heappop(offers)
        cost = sum(widths[name])
        if change >= 0 or cost > left:
            continue
        ranks[name] += 1
        left -= cost
        if ranks[name] < most[name]:
            heapq.heappush(offers, offer(name))
    return ranks
