"""The theory where the target is known: linear regression with anisotropic inputs.

    python benchmarks/theory.py

A layer ``y = W x`` starts at W0, and the data comes from W_tgt = W0 + Delta with inputs of a decaying spectrum. Each
method picks a subspace from n samples, an adapter is fitted to the same n samples, and two errors are measured: the
squared distance ``||W - W_tgt||^2 / ||Delta||^2`` and the excess loss in nats. With A frozen the fit is exact; with A
trained it is Adam on both factors. Beside what is measured stands what is predicted from the true Delta and the true
input covariance S, for the subspace Q [d_in, r] that the method chose:

- ``paper``: bias ``||Delta (I - Q Q^T)||^2``, variance ``trace(F_out^-1) / n * trace(Q^T S^-1 Q)``;
- ``frozen``: the same bias, variance with ``(Q^T S Q)^-1``, the covariance of B when A is frozen;
- ``exact`` (normal inputs, Q independent of the data): the fit makes up in Q for what lies outside
  of it wherever inputs are correlated, so the bias is ``||Delta (I - S Q (Q^T S Q)^-1 Q^T)||^2``; what it cannot make
  up adds to the noise; and n samples count as n - r - 1.

Trials differ in target and data; methods are compared on the same ones. Tables and numbers go to `outputs`, or
where `--output` says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as stats
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from report import markdown
from torch import Tensor

from lora_da_hf import LoRADAConfig
from lora_da_hf.config import Damping
from lora_da_hf.records import LayerStatistics
from lora_da_hf.theory.guidance import Displacement, build_guidance, lowest_subspace
from lora_da_hf.theory.kronecker import factorize_input
from lora_da_hf.theory.solve import factorize, solve_layer
from lora_da_hf.theory.steps import DEFAULT_ROW_NORM

D_IN, D_OUT, RANK = 32, 16, 4
NOISE = 0.5
FROZEN_SIZES = (16, 32, 64, 128, 256, 1024, 4096)
TRAINED_SIZES = (64, 1024)
TRAINED_STEPS = (10, 100, 2000)
LEARNING_RATE = 0.02
NO_DAMPING = Damping(amount=0.0)


# ---- the problems


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer whose target is known.

    Attributes:
        base: ``[d_out, d_in]``.
        delta: ``[d_out, d_in]``, target minus base.
        covariance: ``[d_in, d_in]``, of the inputs, whose mean is zero.
    """

    base: Tensor
    delta: Tensor
    covariance: Tensor

    @property
    def target(self) -> Tensor:
        """W_tgt."""
        return self.base + self.delta

    def inputs(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw inputs, ``[count, d_in]``."""
        return normal(generator, count, self.base.shape[1]) @ torch.linalg.cholesky(self.covariance).mT

    def labels(self, x: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw labels, ``[n, d_out]``, from the model with these weights."""
        outputs = x @ weights.mT
        return outputs + NOISE * normal(generator, *outputs.shape)

    def output_grads(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradients of each sample's negative log-likelihood at the base, ``[n, d_out]``."""
        return (x @ self.base.mT - y) / NOISE**2

    def output_fisher(self) -> Tensor:
        """Return the Fisher information of each output, ``[d_out]``."""
        return torch.full((self.base.shape[0],), 1 / NOISE**2, dtype=torch.float64)

    def distance(self, weights: Tensor) -> float:
        """Return ``||W - W_tgt||^2 / ||Delta||^2``."""
        return ((weights - self.target).square().sum() / self.delta.square().sum()).item()

    def excess(self, weights: Tensor) -> float:
        """Return the expected loss above the target's, in nats."""
        error = weights - self.target
        return ((error @ self.covariance) * error).sum().item() / (2 * NOISE**2)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_problem(seed: int) -> Problem:
    """Make a target whose difference from the base has a decaying spectrum, unrelated to that of the inputs.

    The input covariance has eigenvalues ``k^-1.5``. Delta has singular values ``2^-k`` beside a small full-rank part,
    scaled so that the base is about one nat per four outputs worse than the target.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(normal(generator, D_IN, D_IN)).Q
    spectrum = torch.arange(1, D_IN + 1, dtype=torch.float64) ** -1.5
    covariance = rotation * spectrum @ rotation.mT
    left, right = (torch.linalg.qr(normal(generator, d, D_OUT)).Q for d in (D_OUT, D_IN))
    singular = 2.0 ** -torch.arange(D_OUT, dtype=torch.float64) + 0.02
    delta = left * singular @ right.mT
    loss = ((delta @ covariance) * delta).sum() / (2 * NOISE**2)
    delta = delta * (D_OUT / 4 / loss).sqrt()
    base = normal(generator, D_OUT, D_IN) * 0.3
    return Problem(base=base, delta=delta, covariance=covariance)


# ---- the methods: each maps what it may know to a basis [d_in, r]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the methods choose from.

    Attributes:
        problem: For the oracles alone.
        count: n.
        empirical: Statistics of the n samples.
        generator: For what is random.
    """

    problem: Problem
    count: int
    empirical: LayerStatistics
    generator: torch.Generator


def observe(problem: Problem, x: Tensor, y: Tensor, generator: torch.Generator) -> Known:
    """Take the statistics that a pass over the samples takes."""
    g = problem.output_grads(x, y)
    count = x.shape[0]
    empirical = LayerStatistics(
        input_second_moment=x.mT @ x / count,
        output_grad_second_moment_diag=g.square().mean(dim=0),
        weight_grad=g.mT @ x / count,
        num_input_tokens=count,
        num_output_tokens=count,
    )
    return Known(problem=problem, count=count, empirical=empirical, generator=generator)


def oracle(known: Known) -> Tensor:
    """Return what the guidance matrix gives with the true Delta, input covariance and output Fisher information."""
    problem = known.problem
    factorized = factorize_input(problem.covariance, NO_DAMPING, layer="layer")
    inverse_output = 1 / problem.output_fisher()
    gradient = -(problem.delta @ problem.covariance) / inverse_output[:, None]
    guidance = build_guidance(
        Displacement(scaled_gradient=inverse_output[:, None] * gradient, factorized_input=factorized),
        inverse_output,
        population_size=known.count,
        variance_weight=1.0,
    )
    return lowest_subspace(guidance, RANK).vectors


def by_package(**settings: Any) -> Callable[[Known], Tensor]:
    """Return the method that uses the package with these settings."""
    config = LoRADAConfig(**settings)

    def choose(known: Known) -> Tensor:
        factorized = factorize(known.empirical, config, layer="layer")
        options = {"rank": RANK, "population_size": known.count}
        return torch.linalg.qr(solve_layer(known.empirical, factorized, config, layer="layer", **options).basis_A.mT).Q

    return choose


METHODS: dict[str, Callable[[Known], Tensor]] = {
    "oracle": oracle,
    "LoRA-DA": by_package(variance_weight=1.0),
    "LoRA-DA, default": by_package(),
    "LoRA-DA, a tenth of the damping": by_package(
        variance_weight=1.0, input_damping="0.01*mean", output_damping="0.01*mean"
    ),
    "LoRA-DA, ten times the damping": by_package(variance_weight=1.0, input_damping="1*mean", output_damping="1*mean"),
    "LoRA-DA, no variance": by_package(variance_weight=0.0),
    "LoRA-DA, paper": by_package(**LoRADAConfig.paper().to_dict()),
    "gradient's SVD": by_package(start="gradient"),
    "random": lambda known: torch.linalg.qr(normal(known.generator, D_IN, RANK)).Q,
}


# ---- the fits


def fit_frozen(problem: Problem, x: Tensor, y: Tensor, basis: Tensor) -> Tensor:
    """Fit B to the samples with A frozen at the basis, and return W."""
    z = x @ basis
    return problem.base + torch.linalg.lstsq(z, y - x @ problem.base.mT).solution.mT @ basis.mT


def fit_trained(
    problem: Problem, x: Tensor, y: Tensor, bases: Tensor, marks: tuple[int, ...]
) -> dict[int, list[Tensor]]:
    """Train A and B of several bases ``[m, d_in, r]`` with Adam on all samples; return each W after some steps.

    A starts at the basis with PEFT's row norm and B at zero, so the methods differ in the subspace alone. The learning
    rate falls linearly to a tenth.
    """
    lora_A = (bases.mT * DEFAULT_ROW_NORM).clone().requires_grad_()
    lora_B = torch.zeros(bases.shape[0], D_OUT, RANK, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([lora_A, lora_B], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(marks))
    moment, cross = x.mT @ x / x.shape[0], y.mT @ x / x.shape[0]
    found: dict[int, list[Tensor]] = {}
    for step in range(1, max(marks) + 1):
        weights = problem.base + lora_B @ lora_A
        loss = (((weights @ moment) * weights).sum() / 2 - (weights * cross).sum()) / NOISE**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in marks:
            found[step] = list((problem.base + lora_B @ lora_A).detach())
    return found


# ---- the predictions


def predict(problem: Problem, basis: Tensor, count: int) -> dict[str, float]:
    """Predict distance and excess loss of a fit with A frozen, as the module's text says.

    Returns:
        ``paper``, ``frozen`` and ``exact`` (NaN where n is too small for it), and the bias in them, without variance:
        ``bias`` of the first two, and ``exact_bias``; and ``excess``, of the loss, with ``excess_bias``.
    """
    delta, covariance = problem.delta, problem.covariance
    inner = torch.linalg.inv(basis.mT @ covariance @ basis)
    inverse_fisher = 1 / problem.output_fisher()
    outside = delta - (delta @ basis) @ basis.mT
    left_over = delta - delta @ covariance @ basis @ inner @ basis.mT
    unexplained = ((left_over @ covariance) * left_over).sum(dim=1)  # [d_out]
    noise = inverse_fisher.sum().item()
    size = delta.square().sum().item()
    bound = (basis * torch.linalg.solve(covariance, basis)).sum().item()
    bias = outside.square().sum().item()
    freedom = count - basis.shape[1] - 1
    exact = exact_bias = math.nan
    lost = (unexplained / inverse_fisher).sum().item() / 2
    excess = lost + basis.shape[1] * D_OUT / (2 * count)
    if freedom > 0:
        variance = (inverse_fisher + unexplained).sum().item() * inner.trace().item() / freedom
        exact_bias = left_over.square().sum().item() / size
        exact = exact_bias + variance / size
        excess = lost + basis.shape[1] * (D_OUT / 2 + lost) / freedom
    return {
        "paper": (bias + noise * bound / count) / size,
        "frozen": (bias + noise * inner.trace().item() / count) / size,
        "exact": exact,
        "excess": excess,
        "bias": bias / size,
        "exact_bias": exact_bias,
        "excess_bias": lost,
    }


# ---- the runs


def run_trial(count: int, seed: int) -> tuple[Problem, Tensor, Tensor, dict[str, Tensor]]:
    """Draw a problem and n samples, and return problem, inputs, labels, and the basis that every method chooses."""
    problem = make_problem(seed)
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + count)
    x = problem.inputs(count, generator)
    y = problem.labels(x, problem.target, generator)
    known = observe(problem, x, y, generator)
    return problem, x, y, {name: choose(known) for name, choose in METHODS.items()}


def measured(problem: Problem, weights: Tensor, **facts: Any) -> dict[str, Any]:
    """Return the record of a fit."""
    return {**facts, "distance": problem.distance(weights), "excess": problem.excess(weights)}


def run_frozen(count: int, seeds: range) -> list[dict[str, Any]]:
    """Measure all methods with A frozen, each seed being a problem of its own."""
    records: list[dict[str, Any]] = []
    for seed in seeds:
        problem, x, y, bases = run_trial(count, seed)
        for method, basis in bases.items():
            found = measured(problem, fit_frozen(problem, x, y, basis), samples=count, seed=seed, method=method)
            records.append({**found, "predicted": predict(problem, basis, count)})
    return records


def run_trained(count: int, seeds: range, marks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure all methods with A trained, after some numbers of steps."""
    records: list[dict[str, Any]] = []
    for seed in seeds:
        problem, x, y, bases = run_trial(count, seed)
        for steps, found in fit_trained(problem, x, y, torch.stack(list(bases.values())), marks).items():
            facts = {"samples": count, "seed": seed, "steps": steps}
            records += [measured(problem, w, **facts, method=name) for name, w in zip(bases, found, strict=True)]
    return records


# ---- tables


def select(records: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the records with these values."""
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return stats.fmean(values), stats.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def cell(values: list[float]) -> str:
    return "{:.3g} ± {:.1g}".format(*mean_and_error(values))


def frozen_table(records: list[dict[str, Any]]) -> list[str]:
    rows = []
    for count in sorted({record["samples"] for record in records}):
        for method in METHODS:
            found = select(records, samples=count, method=method)
            guesses = {name: stats.fmean(r["predicted"][name] for r in found) for name in found[0]["predicted"]}
            paper, frozen, exact, predicted = (
                sum_text(guesses, name) for name in ("paper", "frozen", "exact", "excess")
            )
            distance, excess = (cell([r[name] for r in found]) for name in ("distance", "excess"))
            rows.append((count, method, distance, paper, frozen, exact, excess, predicted))
    return markdown(("n", "method", "distance", "paper", "frozen", "exact", "excess loss", "predicted"), rows)


def sum_text(predicted: dict[str, float], name: str) -> str:
    """Return a prediction and what it is the sum of: bias and variance."""
    value, bias = predicted[name], predicted.get(f"{name}_bias", predicted["bias"])
    return "" if math.isnan(value) else f"{value:.3g} = {bias:.3g} + {value - bias:.3g}"


def trained_table(records: list[dict[str, Any]]) -> list[str]:
    marks, rows = sorted({record["steps"] for record in records}), []
    for count in sorted({record["samples"] for record in records}):
        for method in METHODS:
            found = [select(records, samples=count, method=method, steps=steps) for steps in marks]
            rows.append((count, method, *(cell([r["excess"] for r in of_steps]) for of_steps in found)))
    return markdown(("n", "method", *(f"{steps} steps" for steps in marks)), rows)


def tables(frozen: list[dict[str, Any]], trained: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    of_frozen = "A frozen: mean and standard error of {} trials; predictions: sum = bias + variance"
    of_trained = "A trained: excess loss, mean and standard error of {} trials"
    for records, title, table in ((frozen, of_frozen, frozen_table), (trained, of_trained, trained_table)):
        trials = len({record["seed"] for record in records})
        lines += [title.format(trials), "", *table(records), ""] if records else []
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Return records with four digits of each number, and None for one that is not finite."""
    text = json.dumps(value)
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"), parse_constant=lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="problems with A frozen; a third of them with A trained")
    parser.add_argument("--output", type=Path, default=Path("outputs/theory.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    seeds, fewer = range(options.trials), range(max(2, options.trials // 3))
    frozen = [record for count in FROZEN_SIZES for record in run_frozen(count, seeds)]
    trained = [record for count in TRAINED_SIZES for record in run_trained(count, fewer, TRAINED_STEPS)]
    facts = {**machine(), "seconds": round(time.perf_counter() - start, 1), "seeds": list(seeds)}
    shape = {"d_in": D_IN, "d_out": D_OUT, "rank": RANK, "noise": NOISE, "learning_rate": LEARNING_RATE}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "problem": shape, "frozen": rounded(frozen), "trained": rounded(trained)}
    options.output.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    text = tables(frozen, trained) + "\n" + ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n"
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
