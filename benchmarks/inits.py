"""The initialisations that `compare_inits.py` compares: PEFT's own by their documented calls, and this package's."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf import LoRADAConfig, LoRADAReport, apply_init, initialize_lora_da, refit_init
from lora_da_hf.adapters.write import freeze_a
from lora_da_hf.config import SOLVE_SETTINGS
from lora_da_hf.samples import choose_samples


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every method is given.

    Attributes:
        model: The base model, which some methods change.
        samples: The training samples.
        collate: Makes batches of them.
        lora: Arguments of LoraConfig, the same for all methods.
        seed: Of the random adapter.
        samples_seed: Of the choice of samples that a method reads, and of labels that are drawn.
        num_samples: How many samples a method that looks at data may read.
        batch_size: Samples that it runs together.
        settings: Of LoRADAConfig, over those of the method.
        statistics: Where this package's statistics of these samples are kept for other ranks and settings; None:
            nowhere.
    """

    model: nn.Module
    samples: list[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    lora: dict[str, Any]
    seed: int
    samples_seed: int
    num_samples: int
    batch_size: int
    settings: dict[str, Any]
    statistics: Path | None = None

    def config(self, **settings: Any) -> LoraConfig:
        """Make PEFT's config."""
        return LoraConfig(**{"task_type": "CAUSAL_LM", **self.lora, **settings})

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of the samples that a method may read."""
        chosen = random.Random(self.samples_seed).sample(self.samples, min(self.num_samples, len(self.samples)))
        for start in range(0, len(chosen), size):
            yield self.collate(chosen[start : start + size])


Made = tuple[nn.Module, dict[str, Any]]
"""A PEFT model that is initialised, and what there is to note about it."""


def from_peft(**settings: Any) -> Callable[[Setup], Made]:
    """Return a method that PEFT carries out by itself, and that leaves the base's weights alone."""
    return lambda setup: (get_peft_model(setup.model, setup.config(**settings)), {})


def decomposed(**settings: Any) -> Callable[[Setup], Made]:
    """Return a method of PEFT that takes the adapter out of the base's weights."""
    return lambda setup: (take_out_in_float32(setup.model, setup.config(**settings)), {})


def take_out_in_float32(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Make an adapter that is taken out of the base's weights, in float32; then give the rest its dtype back.

    On weights in half precision PEFT rounds adapter and rest apart, and step 0 is not the base model any more.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    places = dict(model.named_parameters())
    made = get_peft_model(model.float(), config)  # pyright: ignore[reportArgumentType] - a PreTrainedModel
    for name, parameter in places.items():
        parameter.data = parameter.data.to(dtypes[name])
    return made


def eva(setup: Setup) -> Made:
    """Make an adapter by EVA, with its ranks left equal (``rho=1``): every layer then has the scaling that all have."""
    config = setup.config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(setup.model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, list(setup.batches(setup.batch_size)), show_progress_bar=False)
    return model, {}


def corda(setup: Setup) -> Made:
    """Make an adapter by CorDA for new knowledge (IPM); it wants single samples without padding."""
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not ask for

    config = setup.config(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    def run_model() -> None:
        for batch in setup.batches(1):
            setup.model(**batch)

    preprocess_corda(setup.model, config, run_model=run_model)
    return take_out_in_float32(setup.model, config), {}


def lora_ga(setup: Setup) -> Made:
    """Make an adapter by LoRA-GA with its default settings."""
    config = setup.config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def train_step() -> None:
        for batch in setup.batches(setup.batch_size):
            setup.model(**batch).loss.backward()

    peft.preprocess_loraga(setup.model, config, train_step)
    return take_out_in_float32(setup.model, config), {}


def lora_da(
    config: Callable[..., LoRADAConfig], *, output_dir: str | None = None, **settings: Any
) -> Callable[[Setup], Made]:
    """Return this package's method with some settings."""

    def make(setup: Setup) -> Made:
        model = get_peft_model(setup.model, setup.config())
        values: dict[str, Any] = {"num_samples": setup.num_samples, "batch_size": setup.batch_size, **settings}
        resolved = config(**{**values, **setup.settings})
        report, solved_again = initialized(model, setup, resolved, output_dir)
        notes = {
            "config": resolved.to_dict(),
            "step_size": report.step_size,
            "kept": len(report.kept),
            "stages": {name: round(seconds, 3) for name, seconds in report.seconds.items()},
            "unseen_loss": [report.unseen_loss_before, report.unseen_loss_after],
            "said": report.notes,
            "solved_again": solved_again,
        }
        return model, notes

    return make


OF_THE_STATISTICS = ("batch_size", "token_mask", "loss_reduction")
"""Settings of LoRADAConfig that say what the statistics of some samples are, and what is stored with them."""

OF_THE_USE = ("step_size", "stable_gamma", "factor_split", "search_samples", "freeze_a")
"""Settings that say what becomes of a stored solution."""


def initialized(
    model: nn.Module, setup: Setup, config: LoRADAConfig, output_dir: str | None
) -> tuple[LoRADAReport, bool]:
    """Initialise, from statistics that were kept of these samples if there are any.

    Returns:
        What was done, and whether statistics of before were solved again.
    """
    samples, values = setup.samples, config.to_dict()
    arguments: dict[str, Any] = {"data_collator": setup.collate, "progress": False}
    folder: Path | None = None
    rank = setup.lora["r"]
    if setup.statistics is not None and output_dir is None:
        chosen = choose_samples(samples, config, seed=setup.samples_seed).statistics
        of_these = [setup.samples_seed, chosen, {name: values[name] for name in OF_THE_STATISTICS}]
        folder = setup.statistics / hashlib.sha256(json.dumps(of_these).encode()).hexdigest()[:16]
        config = dataclasses.replace(config, save_statistics=True)
    if folder is None or not folder.exists():
        given = {"config": config, "seed": setup.samples_seed, "output_dir": folder or output_dir}
        return initialize_lora_da(model, samples, **given, **arguments), False
    with tempfile.TemporaryDirectory() as other:
        solve = {**{name: values[name] for name in SOLVE_SETTINGS}, "max_rank": rank}
        init = refit_init(folder, other, config=solve, rank=rank, step_size=1.0, progress=False)
        use = {name: values[name] for name in OF_THE_USE}
        step = "line_search" if config.searches_step else None
        return apply_init(model, init, config=use, step_size=step, samples=samples, **arguments), True


METHODS: dict[str, Callable[[Setup], Made]] = {
    "lora": from_peft(),
    "pissa": decomposed(init_lora_weights="pissa_niter_16"),
    "olora": decomposed(init_lora_weights="olora"),
    "eva": eva,
    "corda": corda,
    "lora_ga": lora_ga,
    "lora_one": lora_da(LoRADAConfig, start="gradient"),
    "whitened_gradient": lora_da(LoRADAConfig, start="whitened_gradient"),
    "inputs": lora_da(LoRADAConfig, start="inputs"),
    "lora_da_paper": lora_da(LoRADAConfig.paper),
    "lora_da": lora_da(LoRADAConfig),
}
"""All have the scaling that the design names. ``lora_one`` has this package's search and split, and differs from
``lora_da`` with equal steps in the direction alone."""

FROZEN = {"lora_fa": "lora", "lora_da_fa": "lora_da"}
"""Methods that train B alone (LoRA-FA), by what they start from."""

RESET = {"lora_beside_da": "lora_da"}
"""Methods that put a plain adapter in place of one that was made from data, to see how much of it plain LoRA finds."""

MERGED = {"lora_on_da": "lora_da"}
"""Methods that put a start's update into the base's weights and train a plain adapter on top: the step without the
subspace."""

OWN = {"lora_one", "whitened_gradient", "inputs", "lora_da_paper", "lora_da"}
"""Methods of ``METHODS`` that this package's settings go to."""

READ_SAMPLES = {"eva", "corda", "lora_ga", *OWN}
"""Methods of ``METHODS`` whose start depends on data."""


def made_by(method: str) -> str:
    """Return the method of ``METHODS`` that makes the adapter which a method changes before it is trained."""
    return {**FROZEN, **RESET, **MERGED}.get(method, method)


def change(model: nn.Module, method: str, seed: int) -> None:
    """Make of the adapter of ``made_by`` that of the method."""
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and method in (*RESET, *MERGED):
            if method in MERGED:
                weight = layer.get_base_layer().weight
                weight.data = (weight.data.float() + layer.get_delta_weight("default")).to(weight.dtype)
            layer.reset_lora_parameters("default", init_lora_weights=True)
    if method.endswith("_fa"):
        freeze_a(model)


def make_anew(model: nn.Module, method: str, setup: Setup, optimizer: torch.optim.Optimizer) -> None:
    """Put the adapter's update into the base's weights, and make the adapter by its method again, from new samples.

    The head goes on, and what the optimizer remembers of the adapter is forgotten.
    """
    change(model, "lora_on_da", setup.seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            optimizer.state.pop(parameter, None)
    if method == "lora_da":
        config = LoRADAConfig(**{"num_samples": setup.num_samples, "fit_heads": False, **setup.settings})
        given = {"config": config, "data_collator": setup.collate, "progress": False, "batch_size": setup.batch_size}
        initialize_lora_da(model, setup.samples, seed=setup.samples_seed + 1, **given)


def why_missing(method: str, kinds: Collection[type[nn.Module]] = ()) -> str | None:
    """Say why a method cannot be run with the PEFT that is installed on layers of some kinds; None if it can."""
    if method == "olora" and Conv1D in kinds:
        return "PEFT's OLoRA takes no Conv1D layers, which GPT-2 and its like are made of"
    if method == "lora_ga" and not hasattr(peft, "preprocess_loraga"):
        return f"PEFT {importlib.metadata.version('peft')} has no LoRA-GA"
    if method == "corda" and importlib.util.find_spec("attr") is None:
        return "PEFT's CorDA imports attrs, which is not installed"
    return None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of the backbone by name."""
    named = model.base_model.named_modules()  # type: ignore[union-attr]
    return {name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D))}


def target_modules(model: nn.Module) -> list[str]:
    """Name the linear layers as suffixes: CorDA and LoRA-GA know no ``all-linear``."""
    return sorted({name.rpartition(".")[2] for name in linear_layers(model)})


def make_adapter(method: str, setup: Setup) -> Made:
    """Initialise an adapter by a method, from a fresh random state."""
    torch.manual_seed(setup.seed)
    random.seed(setup.seed)
    return METHODS[method](setup)
