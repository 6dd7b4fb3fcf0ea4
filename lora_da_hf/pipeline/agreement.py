"""The check at the start that all processes are to do the same thing with the same samples."""

from __future__ import annotations

from typing import Any

from lora_da_hf.errors import ConfigError
from lora_da_hf.pipeline.job import Job
from lora_da_hf.samples import SampleSplits
from lora_da_hf.statistics.batches import digest_sample
from lora_da_hf.statistics.model_state import random_state, seed_generators

Digests = dict[str, list[str]]
"""A hash of each sample, by what it is used for."""


def check_same_settings(job: Job, population_size: int | None) -> None:
    """Verify that all processes have the same settings and the same adapter.

    Raises:
        ConfigError: on all of them, naming what differs.
    """
    layers = {
        name: (t.rank, t.in_features, t.out_features, t.peft_scaling, t.is_routed) for name, t in job.targets.items()
    }
    settings = {
        **job.config.to_dict(),
        "batch_size": job.batch_size,
        "seed": job.seed,
        "population_size": population_size,
        "output_dir is None": job.output_dir is None,
    }
    adapter = {f"adapter of {name}": layer for name, layer in layers.items()}
    job.ranks.check_same({**settings, **adapter, "layers of the adapter": list(layers)})


def digest_splits(job: Job, splits: SampleSplits) -> Digests:
    """Return a hash of each chosen sample, after verifying that all processes chose the same ones in the same order.

    Each is hashed as the collator makes it, from the same state of the generators. Of one that draws from a generator
    of its own the processes cannot be compared, and the report says so.

    Raises:
        ConfigError: on all of them, saying whether the samples or their order differ.
    """

    def digest(sample: Any) -> str:
        seed_generators(job.seed)
        return digest_sample(job.collate([sample]))

    parts = {"statistics": splits.statistics, "search": splits.search, "unseen": splits.unseen}
    with random_state(job.seed), job.collate.generators_kept():
        digests = {name: [digest(sample) for sample in part] for name, part in parts.items()}
        draws = any(digest(sample) != digests["statistics"][0] for sample in splits.statistics[:1])
    everywhere = job.ranks.gather(digests)
    if all(found == everywhere[0] for found in everywhere):
        return digests
    if any(job.ranks.gather(draws)):
        job.report.notes.append("the collator draws at random, so the samples of the processes were not compared")
        return digests
    unordered = [sorted(digest for part in found.values() for digest in part) for found in everywhere]
    what = "order of the samples" if all(found == unordered[0] for found in unordered) else "samples"
    raise ConfigError(
        f"The processes differ in the {what}. Give all processes the same data in the same order, without a shard for "
        "each: they share the work by themselves."
    )
