"""The main claims of `benchmarks/theory.py`, on fewer trials."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import theory

TRIALS = range(12)


@pytest.fixture(scope="module")
def linear():
    """Records with A frozen, at few, middling and many samples."""
    return [record for count in (16, 64, 1024) for record in theory.run_frozen(count, TRIALS)]


def mean(records, method, count, quantity):
    return statistics.fmean(r[quantity] for r in theory.select(records, method=method, samples=count))


def paired(records, one, other, count, quantity):
    """Return the mean of the differences of two methods on the same trials, in standard errors."""
    columns = [theory.select(records, method=method, samples=count) for method in (one, other)]
    differences = [a[quantity] - b[quantity] for a, b in zip(*columns, strict=True)]
    average, error = theory.mean_and_error(differences)
    return average / error


@pytest.mark.parametrize("method", ["oracle", "random"])
@pytest.mark.parametrize("count", [16, 64, 1024])
def test_distance_and_excess_loss_are_the_predicted_ones_where_the_basis_is_independent_of_the_data(
    linear, method, count
):
    records = theory.select(linear, method=method, samples=count)
    for quantity, guess in (("distance", "exact"), ("excess", "excess")):
        ratios = [r[quantity] / r["predicted"][guess] for r in records]
        average, error = theory.mean_and_error(ratios)
        assert abs(average - 1) < 4 * error, (quantity, average, error)


def test_the_covariance_of_a_frozen_a_is_below_the_papers(linear):
    assert all(r["predicted"]["frozen"] < r["predicted"]["paper"] for r in linear)


@pytest.mark.parametrize("count", [16, 64, 1024])
@pytest.mark.parametrize("other", [name for name in theory.METHODS if name != "oracle"])
def test_the_oracle_is_nearest_to_the_target(linear, count, other):
    assert paired(linear, "oracle", other, count, "distance") < -2


def test_with_many_samples_lora_da_is_nearer_than_the_gradients_svd_and_that_than_random(linear):
    assert paired(linear, "LoRA-DA", "gradient's SVD", 1024, "distance") < -4
    assert paired(linear, "LoRA-DA", "gradient's SVD", 1024, "excess") < -4
    assert paired(linear, "gradient's SVD", "random", 1024, "distance") < -2


def test_the_variance_term_helps_with_few_samples(linear):
    assert paired(linear, "LoRA-DA", "LoRA-DA, no variance", 16, "distance") < -4
    assert paired(linear, "LoRA-DA", "LoRA-DA, no variance", 64, "distance") < -2


def test_with_a_trained_to_the_end_the_start_does_not_matter():
    records = theory.run_trained(1024, range(2), marks=(10, 1500))
    for seed in range(2):
        early, late = ([r["excess"] for r in theory.select(records, seed=seed, steps=steps)] for steps in (10, 1500))
        assert max(late) / min(late) < 1.05
        assert max(early) / min(early) > 1.1
        half_the_parameters = theory.RANK * (theory.D_OUT + theory.D_IN - theory.RANK) / 2
        assert statistics.fmean(late) == pytest.approx(half_the_parameters / 1024, rel=0.7)


def test_the_command_writes_results_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "FROZEN_SIZES", (16, 64))
    monkeypatch.setattr(theory, "TRAINED_SIZES", (64,))
    monkeypatch.setattr(theory, "TRAINED_STEPS", (2, 4))
    output = tmp_path / "results" / "theory.json"
    monkeypatch.setattr(sys, "argv", ["theory.py", "--trials", "2", "--output", str(output)])
    theory.main()
    content = json.loads(output.read_text())
    assert len(content["frozen"]) == 2 * 2 * len(theory.METHODS)
    assert len(content["trained"]) == 2 * 2 * len(theory.METHODS)
    assert all(math.isfinite(r["distance"]) for r in content["frozen"])
    assert {"date", "cpu", "torch", "seeds"} <= set(content["machine"])
    assert "| 64 | oracle |" in output.with_suffix(".md").read_text()
    assert "| 64 | oracle |" in capsys.readouterr().out
