"""The statistics pass as the pipeline runs it, on a plain model, and a reference by autograd one sample at a time."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_da_hf.distributed.processes import Processes
from lora_da_hf.distributed.reduce import reduce_statistics
from lora_da_hf.losses import is_encoder_decoder, longest_labels, make_labelled_head, model_loss, shifts_labels
from lora_da_hf.records import LayerStatistics
from lora_da_hf.samples import pad_samples
from lora_da_hf.statistics.collect import PassResult, PassSettings, collect
from lora_da_hf.statistics.loss_reduction import LossReduction, find_reduction
from lora_da_hf.statistics.model_state import prepared_for_pass, without_checkpointing
from lora_da_hf.statistics.rows import followed_sequences, watched_rows
from lora_da_hf.statistics.taps import Taps, find_shared_inputs, input_groups
from lora_da_hf.statistics.token_masks import read_batch_tokens, tell_sequences_apart
from lora_da_hf.statistics.unlike import choose_unlike


def linear_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name
    }


def widths_of(layer):
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def weight_gradient(layer):
    return layer.weight.grad.mT if isinstance(layer, Conv1D) else layer.weight.grad


@dataclass(kw_only=True)
class Collected:
    statistics: dict[str, LayerStatistics]
    result: PassResult
    reduction: LossReduction
    shared: dict[str, str]


def run_pass(
    model,
    samples,
    *,
    batch_size=1,
    token_mask="attention",
    dtype=torch.float32,
    compute_loss=model_loss,
    collate=pad_samples,
    declared="auto",
    on_samples=lambda count: None,
    lockstep=None,
    labelled_head=False,
):
    layers = linear_layers(model)
    shifts = shifts_labels(model)
    with prepared_for_pass(model, seed=0):

        def run_forward():
            with torch.no_grad():
                compute_loss(model, collate(samples[:1]), None)

        singles = [tell_sequences_apart(collate([sample]), longest_labels(model)) for sample in samples]
        options = {"shifts_labels": shifts, "encoder_decoder": is_encoder_decoder(model), "num_samples": 1}
        rows = []
        with without_checkpointing(model), torch.no_grad():
            for batch in singles:
                with watched_rows(layers) as given:
                    compute_loss(model, batch, None)
                rows.append(given)
        sequences = followed_sequences([read_batch_tokens(batch, **options) for batch in singles], rows)

        with without_checkpointing(model):
            shared = find_shared_inputs(layers, run_forward)
            unlike = choose_unlike(samples, collate, shifts_labels=shifts)
            reduction = find_reduction(compute_loss, model, collate, unlike, shifts_labels=shifts, declared=declared)

        def make_taps():
            return Taps(
                {name: layers[name] for name in shared},
                widths={name: widths_of(layers[name]) for name in shared},
                shared_inputs=shared,
                devices={name: torch.device("cpu") for name in shared},
                dtype=dtype,
            )

        settings = PassSettings(
            batch_size=batch_size,
            token_mask=token_mask,
            shifts_labels=shifts,
            sequences=sequences,
            encoder_decoder=is_encoder_decoder(model),
            reduction=reduction,
            labelled_head=make_labelled_head(model) if labelled_head else None,
        )
        result = collect(
            model,
            samples,
            collate=collate,
            compute_loss=compute_loss,
            settings=settings,
            make_taps=make_taps,
            on_samples=on_samples,
            lockstep=lockstep,
        )
    groups = input_groups(shared)
    statistics = {}
    counts = {"num_samples": result.num_samples, "num_items": result.num_items}
    for _, found in reduce_statistics(result.taps, groups, dict.fromkeys(groups, 0), Processes(0, 1), **counts):
        statistics |= found
    return Collected(statistics=statistics, result=result, reduction=reduction, shared=shared)


def reference(model, samples, *, token_mask="attention", compute_loss=model_loss, mean_of="labels"):
    """Stack every token's input and output gradient, one sample at a time and without padding.

    Args:
        model: A causal model.
        samples: Those without a label do not count.
        token_mask: As in the settings.
        compute_loss: Of one sample, a mean over its labels.
        mean_of: What the objective averages over, ``"labels"`` or ``"samples"``.
    """
    counts = [sum(label != -100 for label in sample["labels"][1:]) for sample in samples]
    samples = [sample for sample, count in zip(samples, counts, strict=True) if count]
    counts = [count if mean_of == "labels" else 1 for count in counts if count]
    layers = linear_layers(model)
    training = model.training
    model.eval()
    rows = {name: ([], []) for name in layers}
    weight_grads = {
        name: torch.zeros(*reversed(widths_of(layer)), dtype=torch.float64) for name, layer in layers.items()
    }
    for sample, count in zip(samples, counts, strict=True):
        labels = torch.as_tensor(sample["labels"])
        calls = []

        def keep(name, calls=calls):
            def hook(_, args, output):
                output.retain_grad()
                calls.append((name, args[0].detach().clone(), output))
                return output.clone()  # what comes next may change it in place

            return hook

        handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
        loss = compute_loss(model, pad_samples([sample]), None) * (count * len(samples) / sum(counts))
        for handle in handles:
            handle.remove()
        model.zero_grad()
        loss.backward()
        kept = torch.ones(len(labels), dtype=torch.bool)
        if token_mask == "labels":
            kept = torch.cat([labels[1:] != -100, torch.tensor([False])])
        for name, layer in layers.items():
            weight_grads[name] += weight_gradient(layer).double()
        for name, x, y in calls:
            rows[name][0].append(x.reshape(-1, x.shape[-1])[kept].double())
            rows[name][1].append(y.grad.reshape(-1, y.shape[-1])[kept].double())
    model.zero_grad()
    model.train(training)
    found = {}
    for name, (inputs, grads) in rows.items():
        x, g = torch.cat(inputs), torch.cat(grads)
        found[name] = LayerStatistics(
            input_second_moment=x.mT @ x / len(x),
            output_grad_second_moment_diag=g.square().mean(0),
            weight_grad=weight_grads[name] / len(samples),
            num_input_tokens=len(x),
            num_output_tokens=len(g),
        )
    return found


def check_equal(found, expected, *, tolerance=1e-5):
    assert set(found) == set(expected)
    assert found
    for name in found:
        for field in ("input_second_moment", "output_grad_second_moment_diag", "weight_grad"):
            a, b = getattr(found[name], field).double(), getattr(expected[name], field).double()
            error = ((a - b).norm() / b.norm()).item()
            assert error <= tolerance, f"{name} {field}: {error:.1e}"
        assert found[name].num_input_tokens == expected[name].num_input_tokens, name
        assert found[name].num_output_tokens == expected[name].num_output_tokens, name


@pytest.fixture
def collected():
    """Return ``collected(model, samples, *, batch_size, token_mask, dtype, compute_loss, collate, declared)``."""
    return run_pass


@pytest.fixture
def stacked():
    """Return ``stacked(model, samples, *, token_mask, compute_loss)``: the reference statistics by layer."""
    return reference


@pytest.fixture
def assert_equal_statistics():
    """Return a function that compares two dictionaries of statistics in relative Frobenius norm."""
    return check_equal


def cpu_products():
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.mkldnn.matmul.fp32_precision
    return {"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "reduced")  # torch before 2.9


@pytest.fixture
def float32_products():
    """Return a function that tells how the CPU multiplies float32 now: ``"ieee"`` if in full precision."""
    return cpu_products
