"""Which samples are used for what, and how they become batches."""

import random

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler

from lora_da_hf.collator import DeviceCollator
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import DataError
from lora_da_hf.samples import choose_samples, pad_samples, samples_of_loader


def choose(samples, *, seed=0, population_size=None, **settings):
    return choose_samples(
        samples,
        LoRADAConfig(**{"num_samples": 10, "search_samples": 4, **settings}),
        seed=seed,
        population_size=population_size,
    )


def sizes(splits):
    return len(splits.statistics), len(splits.search), len(splits.unseen)


def test_the_sets_are_disjoint_samples_of_the_data():
    samples = list(range(100, 200))
    splits = choose(samples)
    drawn = [*splits.statistics, *splits.search, *splits.unseen]
    assert sizes(splits) == (10, 4, 4)
    assert len(set(drawn)) == 18
    assert set(drawn) <= set(samples)
    assert splits.population_size == 100
    assert splits.notes == ()


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (31, (10, 3, 3)),
        (14, (10, 1, 1)),
        (11, (9, 1, 1)),
        (8, (6, 1, 1)),
        (7, (6, 1, 0)),
        (2, (1, 1, 0)),
    ],
)
def test_the_search_takes_an_eighth_of_the_data_at_most(available, expected):
    splits = choose(list(range(available)))
    assert sizes(splits) == expected


def endless():
    number = 0
    while True:
        yield number
        number += 1


def test_a_stream_is_read_from_its_head_and_no_further():
    stream = endless()
    splits = choose(stream, population_size=500)
    assert splits.statistics == list(range(10))
    assert [*splits.search, *splits.unseen] == list(range(10, 18))
    assert splits.population_size == 500
    assert next(stream) == 18


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        ([{"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}], "return_tensors"),
        ([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 4)}], "'x' differ in more than their length"),
    ],
)
def test_samples_of_another_form_are_an_error(samples, name):
    with pytest.raises(DataError, match=name):
        pad_samples(samples)


def test_batches_go_to_the_device_and_other_values_stay():
    collate = DeviceCollator(lambda samples: {"input_ids": torch.tensor(samples), "names": ["a"]}, "meta")
    batch = collate((1, 2))
    assert batch["input_ids"].device.type == "meta"
    assert batch["names"] == ["a"]
    nested = DeviceCollator(lambda samples: {"labels": [{"boxes": torch.zeros(2)}]}, "meta")([1])
    assert nested["labels"][0]["boxes"].device.type == "meta"


def test_a_generator_of_a_collator_s_class_is_put_back():
    class OfTheClass:
        generator = random.Random(7)

        @classmethod
        def collate(cls, rows):
            return {"drawn": cls.generator.random(), "rows": rows}

    collate = DeviceCollator(OfTheClass.collate, "cpu")
    found = []
    for _ in range(2):
        with collate.generators_kept():
            found.append(collate([1])["drawn"])
    assert found == [random.Random(7).random()] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": SubsetRandomSampler([1, 3, 5, 7])},
        {"sampler": [1, 3, 5, 7]},
        {"batch_sampler": BatchSampler(SubsetRandomSampler([1, 3, 5, 7]), 2, drop_last=False)},
        {"batch_sampler": [[1, 3], (7, 5)]},
    ],
)
def test_a_loader_over_a_part_of_a_data_set_gives_no_sample_of_the_rest(settings):
    samples, _ = samples_of_loader(DataLoader(list(range(10)), **settings))
    splits = choose(samples)
    assert {*splits.statistics, *splits.search, *splits.unseen} == {1, 3, 5, 7}
    assert splits.population_size == 4
