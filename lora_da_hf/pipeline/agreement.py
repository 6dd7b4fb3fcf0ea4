"""What all processes do alike: choose the same samples, after a check that they were given the same."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from lora_da_hf.errors import ConfigError
from lora_da_hf.losses import shifts_labels
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import SampleSplits, choose_samples, has_positions
from lora_da_hf.statistics.batches import digest_sample
from lora_da_hf.statistics.model_state import random_state, seed_generators
from lora_da_hf.statistics.token_masks import read_batch_tokens


def check_same_settings(job: Job, **others: Any) -> None:
    """Verify that all processes have the same settings and the same adapter."""
    adapter = {
        f"adapter of {t.name}": (t.rank, t.in_features, t.out_features, t.peft_scaling) for t in job.scan.targets
    }
    settings = {**job.config.to_dict(), "batch_size": job.batch_size, "seed": job.seed}
    job.processes.check_same({**settings, **others, **adapter, "order of the layers": list(job.targets)})


def choose_together(
    job: Job, samples: Any, population_size: int | None, *, with_heads: bool = False
) -> tuple[SampleSplits, dict[str, list[str]], tuple[str, ...]]:
    """Choose the samples, the same on every process, with a hash of each by its use, and what to note.

    A stream is read by the first process, for all. Samples are hashed as the collator makes them, from the same state
    of the generators; if it draws from one of its own, the processes cannot be compared.
    """

    def has_one_label(sample: Any) -> bool:
        tokens = read_batch_tokens(job.collate([sample]), shifts_labels=shifts_labels(job.model), num_samples=1)
        return tokens.num_labels in (None, 1)

    def digest(sample: Any) -> str:
        seed_generators(job.seed)
        return digest_sample(job.collate([sample]))

    alike = has_positions(samples)
    job.processes.check_same({"kind of samples": "with positions" if alike else "a stream"})
    mine = None
    with random_state(job.seed), job.collate.generators_kept():
        if alike or job.processes.is_main:
            chosen: dict[str, Any] = {"has_one_label": has_one_label, "with_heads": with_heads}
            mine = choose_samples(samples, job.config, seed=job.seed, population_size=population_size, **chosen)
    splits = mine if alike else job.processes.gather(mine)[0]
    assert splits is not None  # the first process reads in any case
    parts = {"statistics": splits.statistics, "search": splits.search, "unseen": splits.unseen, "heads": splits.heads}
    with random_state(job.seed), job.collate.generators_kept():
        digests = {name: [digest(sample) for sample in part] for name, part in parts.items()}
        draws = any(digest(sample) != digests["statistics"][0] for sample in splits.statistics[:1])
    everywhere = job.processes.gather((digests, draws))
    if all(found == digests for found, _ in everywhere):
        return *_without_repeats(splits, digests), ()
    if any(drawing for _, drawing in everywhere):
        return splits, digests, ("the collator draws at random, so the samples of the processes were not compared",)
    raise ConfigError(
        "The processes differ in the samples, or in the order of the samples. Give all processes the same data in the "
        "same order, without a shard for each: they share the work by themselves."
    )


def _without_repeats(splits: SampleSplits, digests: dict[str, list[str]]) -> tuple[SampleSplits, dict[str, list[str]]]:
    """Take out what the search has, and out of statistics and heads' samples what the final check has, if any stay."""
    held_out, left_out, notes = {*digests["search"]}, 0, splits.notes
    for name in ("unseen", "statistics", "heads"):
        samples = zip(getattr(splits, name), digests[name], strict=True)
        others = [(sample, digest) for sample, digest in samples if digest not in held_out]
        held_out |= {*digests["unseen"]}
        if digests[name] and not others:
            notes += (f"all samples for {name} repeat others, so the losses say little of new data",)
        elif len(others) < len(digests[name]):
            left_out += len(digests[name]) - len(others)
            splits = dataclasses.replace(splits, **{name: [sample for sample, _ in others]})
            digests = {**digests, name: [digest for _, digest in others]}
    if left_out:
        notes += (f"{left_out} samples were left out, since they repeat those of the search or the final check",)
    return dataclasses.replace(splits, notes=notes), digests


def fingerprint(splits: SampleSplits, digests: Mapping[str, list[str]]) -> str:
    """Hash the samples that the statistics are of, by their tokens if they have any: collators differ."""
    ids = [sample.get("input_ids") for sample in splits.statistics if isinstance(sample, Mapping)]
    tokens = [str(one.tolist() if hasattr(one, "tolist") else one) for one in ids if one is not None]
    return hashlib.sha256("".join(tokens or digests["statistics"]).encode()).hexdigest()
