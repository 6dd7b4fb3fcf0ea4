"""From the sums of every process to the mean statistics of each layer, at the process that owns it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from lora_da_hf.distributed.processes import Processes
from lora_da_hf.records import LayerStatistics
from lora_da_hf.statistics.moments import mirror_upper_, pack_upper, unpack_upper
from lora_da_hf.statistics.taps import Taps


def reduce_statistics(
    taps: Taps,
    groups: Mapping[str, list[str]],
    owners: Mapping[str, int],
    processes: Processes,
    *,
    num_samples: int,
    num_items: int,
) -> Iterator[tuple[str, dict[str, LayerStatistics]]]:
    """Sum each group of layers over the processes and give the means to the group's owner.

    Every process must run the iteration to its end. The input moment travels as a packed triangle. The sums of a group
    are overwritten or released as it is reduced.

    Yields:
        The leader's name, with the statistics of its layers on the owner, and with nothing on the others.
    """
    tokens = dict(zip(taps.taps, processes.sum([tap.num_tokens for tap in taps.taps.values()]), strict=True))
    per_sample = num_items / num_samples if num_samples else 1.0
    for leader, members in groups.items():
        owner = owners[leader]
        moment = taps.taps[leader].input_moment
        if processes.count > 1:
            packed = pack_upper(moment)
            processes.reduce_sum_(packed, owner)
            moment = unpack_upper(packed, moment.shape[0]) if processes.index == owner else moment
        else:
            mirror_upper_(moment)
        moment /= max(tokens[leader], 1)
        statistics: dict[str, LayerStatistics] = {}
        for name in members:
            tap = taps.taps[name]
            processes.reduce_sum_(tap.squares, owner)
            processes.reduce_sum_(tap.weight_grad, owner)
            if processes.index == owner:
                statistics[name] = LayerStatistics(
                    input_second_moment=moment,
                    output_grad_second_moment_diag=tap.squares.div_(max(tokens[name], 1) * per_sample**2),
                    weight_grad=tap.weight_grad.div_(max(num_items, 1)),
                    num_input_tokens=int(tokens[leader]),
                    num_output_tokens=int(tokens[name]),
                )
            tap.input_moment = tap.squares = tap.weight_grad = torch.empty(0)
        yield leader, statistics
