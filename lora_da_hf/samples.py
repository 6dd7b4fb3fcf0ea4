"""Which samples an initialisation reads, and how they become batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from lora_da_hf.collator import RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import DataError
from lora_da_hf.statistics.token_masks import IGNORED_LABEL

_TIMES_WITH_ONE_LABEL = 4
"""Search samples for one, where each has one label alone and says less."""

_TIMES_FOR_HEADS = 4
"""Samples to fit a new head on for one of the statistics, since they cost a forward pass alone."""


@dataclass(frozen=True, kw_only=True)
class SampleSplits:
    """The samples by what they are used for. No sample is in two of them, but for those of heads where there are few.

    Attributes:
        statistics: For the statistics.
        search: For the line search.
        unseen: For nothing but the loss before and after.
        heads: To fit new heads on; the statistics' are added if the data has too few others.
        population_size: N, the number of samples that training draws from.
    """

    statistics: list[Any]
    search: list[Any]
    unseen: list[Any]
    heads: list[Any] = field(default_factory=list[Any])
    population_size: int
    notes: tuple[str, ...] = ()


def choose_samples(
    samples: Any,
    config: LoRADAConfig,
    *,
    seed: int,
    population_size: int | None = None,
    has_one_label: Callable[[Any], bool] = lambda sample: False,
    with_heads: bool = False,
) -> SampleSplits:
    """Draw disjoint sets of samples for the statistics, the line search, the final check, and new heads.

    The search and the unseen set get at most an eighth of the data each, and the search one sample in any case; four
    times as many if the first sample has one label alone. With fewer samples than asked, the statistics get the rest.
    Heads get four times as many as the statistics, as far as there are more. A stream is read from its head.

    Raises:
        DataError: if samples are missing or too few for a line search, or the population size is not known.
    """
    if isinstance(samples, Mapping):
        raise DataError("samples is a mapping; give a list of samples, each a mapping of its own.")
    if not has_positions(samples) and not isinstance(samples, Iterable):
        raise DataError(f"samples is a {type(samples).__name__}; give a list, a data set or a data loader.")
    source: Any = samples
    reader: Iterator[Any] | None = None if has_positions(samples) else iter(source)
    first = list(itertools.islice(reader, 1)) if reader else [source[0]] if len(source) else []
    if not first:
        raise DataError("No samples to take statistics from. Check the training set and its filters.")
    search = config.search_samples * (_TIMES_WITH_ONE_LABEL if has_one_label(first[0]) else 1)
    wanted = config.num_samples + 2 * search
    for_heads = _TIMES_FOR_HEADS * config.num_samples if with_heads else 0
    if reader is None:
        data_size = len(source)
        population_size = population_size or data_size
        indices = random.Random(seed).sample(range(data_size), min(wanted, data_size))
        others = random.Random(seed + 1).sample(range(data_size), min(wanted + for_heads, data_size))
        known = set(indices)
        indices += [index for index in others if index not in known][:for_heads]
        drawn = [source[index] for index in indices]
    else:
        drawn = [*first, *itertools.islice(reader, wanted + for_heads - 1)]
        population_size = population_size or (len(source) if isinstance(samples, Sized) else None)
        data_size = max(population_size or 0, wanted) if len(drawn) == wanted + for_heads else len(drawn)
    if population_size is None:
        raise DataError(
            "The training data is a stream, so its size is not known. Give population_size: "
            "about how many samples training will see."
        )
    return _split(drawn, config, search, population_size, data_size, for_heads)


def with_columns_of(samples: Any, others: Any) -> Any:
    """Drop the columns that another data set lacks, if it has a part of the same: a trainer drops some of its own."""
    columns, kept = (getattr(one, "column_names", None) for one in (samples, others))
    if not isinstance(columns, list) or not isinstance(kept, list) or not set(kept) < set(columns):
        return samples
    return samples.select_columns(kept)


def has_positions(samples: Any) -> bool:
    """Tell whether samples can be picked by position; a stream cannot, even if it knows its length."""
    is_stream = isinstance(samples, IterableDataset)  # which has a __getitem__ that raises
    return isinstance(samples, Sized) and hasattr(samples, "__getitem__") and not is_stream


def _split(
    drawn: list[Any], config: LoRADAConfig, search_samples: int, population_size: int, data_size: int, for_heads: int
) -> SampleSplits:
    num_heads = max(0, min(for_heads, len(drawn) - config.num_samples - 2 * search_samples))
    available = len(drawn) - num_heads
    search = unseen = 0
    if config.searches_step:
        if available < 2:
            raise DataError(
                "Only one sample, and the line search needs one that the statistics did not see. Give more "
                "samples, or a step_size."
            )
        search = min(search_samples, max(1, data_size // 8))
        unseen = min(search_samples, data_size // 8)
    elif available > config.num_samples:
        unseen = min(search_samples, available - config.num_samples)
    statistics = min(config.num_samples, available - search - unseen)
    note = f"{statistics} samples for the statistics instead of {config.num_samples}: there are {available}"
    end = statistics + search + unseen
    heads = drawn[available:]
    return SampleSplits(
        statistics=drawn[:statistics],
        search=drawn[statistics : statistics + search],
        unseen=drawn[statistics + search : end],
        heads=heads if not for_heads or len(heads) >= statistics else [*heads, *drawn[:statistics]],
        population_size=population_size,
        notes=(note,) if statistics < config.num_samples else (),
    )


def samples_of_loader(loader: Any) -> tuple[Any, RawCollate | None]:
    """Return the samples behind a data loader, and what collates them; None if it has no data set.

    Of a `SubsetRandomSampler`, or a list of indices, those samples alone. Weights of a sampler are not followed.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: RawCollate | None = getattr(loader, "collate_fn", None)
    while type(dataset).__name__ == "IterableDatasetShard":  # accelerate's and transformers'
        dataset = dataset.dataset
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # accelerate's shards
        batches = batches.batch_sampler
    sampler: Any = getattr(loader, "sampler", None) if batches is None else getattr(batches, "sampler", batches)
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(dataset, list(sampler.indices)), collate
    if isinstance(sampler, list | tuple | range):
        sampler = [*itertools.chain(*(batches or ()))] if sampler is batches else list(sampler)
        return Subset(dataset, sampler), collate
    return dataset, collate


def is_loader(samples: Any) -> bool:
    """Tell a data loader from samples."""
    return isinstance(samples, DataLoader) or (hasattr(samples, "dataset") and hasattr(samples, "collate_fn"))


def pad_samples(samples: list[Any]) -> dict[str, Tensor]:
    """Collate samples of token lists by padding on the right, labels with -100 and everything else with 0.

    Samples without an attention mask get one, of ``input_ids`` with one dimension.

    Raises:
        DataError: if a sample is not a mapping of numbers, or has a dimension for the batch.
    """
    rows = [_tensors(sample) for sample in samples]
    if any(set(row) != set(rows[0]) for row in rows):
        raise DataError(f"Samples have different keys: {sorted(rows[0])} and others. Give all of them the same.")
    ids = [row.get("input_ids") for row in rows]
    joined = next((i for i in ids if i is not None and i.dim() > 1 and len(i) == 1), None)
    if joined is not None:
        raise DataError(
            f"A sample's input_ids have shape {list(joined.shape)}, with a dimension for the batch. Tokenise samples "
            "without return_tensors, or give a data_collator that joins them."
        )
    if "attention_mask" not in rows[0] and all(i is not None and i.dim() == 1 for i in ids):
        for row in rows:
            row["attention_mask"] = torch.ones_like(row["input_ids"])
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].dim() == 0 or all(v.shape == values[0].shape for v in values):
            batch[name] = torch.stack(values)
            continue
        if any(value.shape[1:] != values[0].shape[1:] for value in values):
            shapes = ", ".join(str(list(value.shape)) for value in values[:3])
            raise DataError(
                f"The samples' {name!r} differ in more than their length ({shapes}), and cannot be padded to one "
                "batch. Give a data_collator that can."
            )
        padding = IGNORED_LABEL if "labels" in name else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    return batch


def _tensors(sample: Any) -> dict[str, Tensor]:
    if not isinstance(sample, Mapping):
        raise DataError(
            f"A sample is a {type(sample).__name__}; it must map names such as input_ids and labels to numbers. Give a "
            "data_collator for samples of another form."
        )
    row = {}
    for name, value in sample.items():
        if value is None:
            continue
        try:
            is_empty = isinstance(value, list) and not value
            row[str(name)] = torch.tensor([], dtype=torch.long) if is_empty else torch.as_tensor(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The sample's {name!r} is a {type(value).__name__}, which cannot be made a tensor. Tokenise the "
                "samples first and drop other columns, or give a data_collator."
            ) from error
    return row
