import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_da_hf.errors import ConfigError
from lora_da_hf.theory.rank_budget import allocate_ranks, num_adapter_parameters

SQUARE = {"a": (4, 6), "b": (4, 6), "c": (4, 6)}


def decrease(spectra, ranks):
    return -sum(sum(spectra[name][:rank]) for name, rank in ranks.items())


def all_choices(spectra, widths, budget):
    ranges = [range(1, len(values) + 1) for values in spectra.values()]
    for ranks in itertools.product(*ranges):
        choice = dict(zip(spectra, ranks, strict=True))
        if num_adapter_parameters(choice, widths) <= budget:
            yield choice


spectra_of = st.lists(st.floats(-1, 0.3), min_size=1, max_size=4).map(sorted)


@settings(deadline=None)
@given(st.fixed_dictionaries({name: spectra_of for name in SQUARE}), st.integers(0, 100))
def test_with_equal_widths_nothing_within_the_budget_is_better(spectra, extra):
    budget = 10 * 3 + extra
    ranks = allocate_ranks(spectra, SQUARE, budget)
    best = max(decrease(spectra, choice) for choice in all_choices(spectra, SQUARE, budget))
    assert num_adapter_parameters(ranks, SQUARE) <= budget
    assert min(ranks.values()) >= 1
    assert decrease(spectra, ranks) == pytest.approx(best)


@settings(deadline=None)
@given(
    st.fixed_dictionaries({name: spectra_of for name in "abc"}),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=3),
    st.integers(0, 80),
)
def test_with_other_widths_the_best_is_better_by_less_than_one_direction(spectra, sizes, extra):
    widths = dict(zip("abc", sizes, strict=True))
    budget = num_adapter_parameters(dict.fromkeys(widths, 1), widths) + extra
    ranks = allocate_ranks(spectra, widths, budget)
    assert num_adapter_parameters(ranks, widths) <= budget
    best = max(decrease(spectra, choice) for choice in all_choices(spectra, widths, budget))
    largest = max((-values[1] for values in spectra.values() if len(values) > 1), default=0.0)
    assert best - decrease(spectra, ranks) <= max(largest, 0) + 1e-12


def test_equal_layers_share_in_their_order():
    spectra = {name: [-1.0, -0.5] for name in "abc"}
    assert allocate_ranks(spectra, SQUARE, 40) == {"a": 2, "b": 1, "c": 1}


def test_a_budget_that_does_not_buy_one_rank_each_is_refused():
    spectra = {name: [-1.0, -0.5] for name in "abc"}
    message = "budget of 29 parameters is too small: rank 1 in each of the 3 layers takes 30, and all that is stored 60"
    with pytest.raises(ConfigError, match=message):
        allocate_ranks(spectra, SQUARE, 29)
