"""From the sums of every process to the mean statistics of each layer, at the process that owns it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
    fed = dict(zip(taps.taps, processes.sum([tap.input_sum.num_tokens for tap in taps.taps.values()]), strict=True))
    put_out = dict(zip(taps.taps, processes.sum([tap.sums.num_tokens for tap in taps.taps.values()]), strict=True))
    per_sample = num_items / num_samples if num_samples else 1.0
    for leader, members in groups.items():
        owner = owners[leader]
        moment = taps.taps[leader].input_sum.total
        if processes.count > 1:
            moment = _reduce_small(taps, leader, members, owner, processes)
        else:
            mirror_upper_(moment)
        statistics: dict[str, LayerStatistics] = {}
        if processes.index == owner:
            moment /= max(fed[leader], 1)
        for name in members:
            sums = taps.taps[name].sums
            processes.reduce_sum_(sums.weight_grad, owner)
            if processes.index == owner:
                statistics[name] = LayerStatistics(
                    input_second_moment=moment,
                    output_grad_second_moment_diag=sums.squares.div_(max(put_out[name], 1) * per_sample**2),
                    weight_grad=sums.weight_grad.div_(max(num_items, 1)),
                    num_input_tokens=int(fed[leader]),
                    num_output_tokens=int(put_out[name]),
                )
        yield leader, statistics
        taps.taps[leader].input_sum.total = torch.empty(0)
        for name in members:
            taps.taps[name].sums.squares = taps.taps[name].sums.weight_grad = torch.empty(0)


def _reduce_small(taps: Taps, leader: str, members: list[str], owner: int, processes: Processes) -> Tensor:
    """Reduce a group's input moment, as a triangle, and its sums of ``g**2`` in one message; return the moment."""
    moment = taps.taps[leader].input_sum.total
    squares = [taps.taps[name].sums.squares for name in members]
    packed = torch.cat([pack_upper(moment), *squares])
    processes.reduce_sum_(packed, owner)
    if processes.index != owner:
        return moment
    triangle, *reduced = packed.split([packed.numel() - sum(map(len, squares)), *map(len, squares)])
    for sums, total in zip(squares, reduced, strict=True):
        sums.copy_(total)
    return unpack_upper(triangle, moment.shape[0])
