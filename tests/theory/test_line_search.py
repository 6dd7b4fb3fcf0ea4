"""The step that is found is never above the loss of no step, and is near the best one."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_da_hf.theory.line_search import Losses, line_search


def search(loss, *, baseline, **options):
    """Search with losses of two batches that are the same, which have no error."""

    def one(value):
        return Losses(((value, 1),) * 2)

    return line_search(lambda step: one(loss(step)), baseline=one(baseline), **options)


LOSSES = st.floats(-1e300, 1e300) | st.sampled_from([math.inf, -math.inf, math.nan])  # a mean of larger ones overflows
FACTOR = 10**0.5


def bowl(minimum, *, depth=1.0, power=2.0, baseline=1.0):
    """Return a loss that is unimodal in the logarithm of the step."""
    return lambda step: baseline - depth + abs(math.log10(step / minimum)) ** power


@given(losses=st.lists(LOSSES, min_size=24, max_size=24), baseline=LOSSES, refine=st.booleans())
def test_whatever_the_loss_does_the_result_is_never_above_the_baseline(losses, baseline, refine):
    left = list(losses)
    tried = []

    def evaluate(step):
        tried.append(step)
        return left.pop() if left else 0.5

    result = search(evaluate, baseline=baseline, refine=refine)
    assert len(tried) == len(set(tried)) == len(result.evaluations) <= 25
    assert min(tried) >= 1e-5
    if result.step_size:
        assert result.loss < baseline
        assert (result.step_size, result.loss) in result.evaluations
        assert result.loss == min(loss for _, loss in result.evaluations)
    else:
        assert result.step_size == 0.0
        assert result.loss == baseline or math.isnan(baseline)


@given(
    exponent=st.floats(-4.4, 5.0),
    power=st.floats(0.3, 4.0),
    start=st.sampled_from([1e-3, 0.1, 1.0]),
    scale=st.floats(0.01, 100),
)
def test_the_minimum_of_a_unimodal_loss_is_found_within_a_factor(exponent, power, start, scale):
    minimum = 10**exponent
    loss = bowl(minimum, power=power)
    result = search(lambda step: scale * loss(step), baseline=math.inf, start=start)
    assert 1 / FACTOR - 1e-9 <= result.step_size / minimum <= FACTOR + 1e-9


@given(exponent=st.floats(-4.2, 5.0))
def test_the_vertex_of_a_parabola_is_found(exponent):
    minimum = 10**exponent
    result = search(bowl(minimum), baseline=2.0)
    assert abs(math.log10(result.step_size / minimum)) <= 0.1 * 0.5 + 1e-6  # shifts below a tenth are not worth a pass


def test_a_search_that_falls_for_ever_ends():
    result = search(lambda step: -math.log(step), baseline=0.0)
    assert len(result.evaluations) == 24
    assert result.step_size == max(step for step, _ in result.evaluations)


def test_a_search_that_rises_for_ever_ends_above_the_smallest_step():
    result = search(lambda step: 2 + step, baseline=1.0)
    assert result.step_size == 0.0
    assert result.loss == 1.0
    assert 1e-5 <= min(step for step, _ in result.evaluations) < 1e-5 * FACTOR


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_as_a_rise(value):
    loss = bowl(0.01)
    result = search(lambda step: loss(step) if step < 0.05 else value, baseline=2.0)
    assert result.step_size == pytest.approx(0.01, rel=0.2)
    assert all(not math.isnan(loss) for _, loss in result.evaluations)


def losses(values):
    return Losses(tuple((value, 2) for value in values))


def test_the_error_of_a_difference_is_that_of_its_mean_over_batches():
    before, after = losses([2.0, 4.0, 6.0]), losses([1.0, 2.0, 6.0])
    assert (before.mean, after.mean) == (2.0, 1.5)
    differences = [-0.5, -1.0, 0.0]  # of an item
    assert after.error_beside(before) == pytest.approx(statistics.stdev(differences) / 3**0.5)
    assert losses([1.0]).error_beside(losses([2.0])) == math.inf
    assert math.isnan(Losses(()).mean)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 10.0), (0.1, 1.0), (1.0, 0.0)])
def test_a_longer_step_has_to_lower_the_loss_beyond_its_error(noise, expected):
    gains = {1.0: 0.5, 10.0: 0.55}

    def evaluate(step):
        sign = {1.0: 1, 10.0: -1}.get(step, 0)
        return losses([3.0 - gains.get(step, 0.0) + sign * noise * part for part in (-1, 1, -1, 1)])

    result = line_search(evaluate, baseline=losses([3.0] * 4), start=1.0, factor=10.0, refine=False)
    assert result.step_size == expected
