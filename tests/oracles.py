"""What is expected: statistics by autograd, one sample at a time, and solutions by dense linear algebra in numpy."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers.pytorch_utils import Conv1D

from lora_da_hf import load_init
from lora_da_hf.artifacts.tensors import iterate_statistics


def collate(samples, *, left=False):
    """Pad token lists, on the right or on the left."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def padded(row, value):
        filling = [value] * (longest - len(row))
        return filling + row if left else row + filling

    return {name: torch.tensor([padded(s[name], value) for s in samples]) for name, value in padding.items()}


def model_loss(model, batch, num_items=None):
    """Return the loss that the model computes; the sum over labels is divided by ``num_items`` if that is given."""
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    return model(**batch, **extra).loss


def stored_statistics(folder):
    """Return the statistics of a stored initialisation, by layer, with whole moments."""
    stored = load_init(folder)
    layers = {n: layer for g in iterate_statistics(stored.folder, stored.manifest) for n, layer in g.items()}
    return {n: replace(one, input_second_moment=one.input_second_moment.full()) for n, one in layers.items()}


def lora_layers(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {n: m for n, m in base.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}


def base_linear_layers(model):
    """Return the layers of the base model that carry adapters, by the base model's names."""
    return {name: module.base_layer for name, module in lora_layers(model).items()}


@dataclass
class Reference:
    """Statistics of a layer computed one sample at a time by plain autograd."""

    weight_grad: torch.Tensor
    input_second_moment: torch.Tensor
    output_grad_second_moment_diag: torch.Tensor
    num_input_tokens: int
    num_output_tokens: int
    input_mean: torch.Tensor

    @classmethod
    def of(cls, weight_grad, rows):
        """Take the means over rows of inputs and of output gradients, each a list of ``[rows, features]``."""
        x, g = (torch.cat(parts).double() for parts in rows)
        return cls(weight_grad, x.mT @ x / len(x), g.square().mean(0), len(x), len(g), x.mean(0))


def items_of(report, *, shifted=True):
    """Return what maps the batch of one sample to the number of items that the measured objective averages over in it.

    Args:
        report: Of the initialisation.
        shifted: Whether position t predicts label t + 1.
    """
    if report.loss_reduction.split()[0] not in ("sum", "token_mean"):
        return lambda batch: 1
    return lambda batch: int((batch["labels"][..., int(shifted) :] != -100).sum())


def autograd_statistics(model, samples, loss_of, collate=collate, items_of=lambda batch: 1, token_mask="attention"):
    """Compute the statistics of every layer from autograd's own gradients.

    Args:
        model: A PEFT model whose adapter is a no-op.
        samples: Samples.
        loss_of: Maps the model and the batch of one sample to that sample's mean loss.
        collate: Makes batches. Of a batch's rows, one for each place of its attention mask, those that are attended to
            count in the second moments.
        items_of: Maps the batch of one sample to what its mean loss weighs: its number of labels, or 1.
        token_mask: ``"labels"``: the rows that predict a label count, of a causal model.
    """
    weighs = [items_of(collate([sample])) for sample in samples]
    parts = [weight * len(samples) / sum(weighs) for weight in weighs]

    def part_of(sample, part):
        return loss_of(model, collate([sample])) * part

    layers = {n: m for n, m in base_linear_layers(model).items() if isinstance(m, torch.nn.Linear | Conv1D)}
    weights = {**{name: layer.weight for name, layer in layers.items()}, **expert_weights(model)}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode = model.training
    model.eval()
    calls = []

    def keep(name):
        def hook(_, args, output):
            if not output.requires_grad:  # as in a reference model's pass
                return output
            output.retain_grad()
            calls.append((name, args[0].detach(), output))
            return output.clone()  # what comes next may change it in place

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    rows = {name: ([], []) for name in layers}
    try:
        with model.disable_adapter():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for sample, part in zip(samples, parts, strict=True):
                batch = collate([sample])
                attended = batch.get("attention_mask", torch.ones(0)).bool().flatten()
                if token_mask == "labels":
                    attended = torch.cat([batch["labels"][0, 1:] != -100, torch.tensor([False])])
                part_of(sample, part).backward()
                for name, x, y in calls:
                    if y.grad is not None:
                        counts = attended if len(attended) == y[..., 0].numel() else slice(None)
                        rows[name][0].append(x.reshape(-1, x.shape[-1])[counts])
                        rows[name][1].append(y.grad.reshape(-1, y.shape[-1])[counts])
                calls.clear()
            grads = {name: weight.grad.double() / len(samples) for name, weight in weights.items()}
            expert_rows = _rows_of_experts(
                model, lambda: [part_of(*s).backward() for s in zip(samples, parts, strict=True)]
            )
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        model.train(mode)
    found = {
        name: Reference.of(grads[name].mT if isinstance(layer, Conv1D) else grads[name], rows[name])
        for name, layer in layers.items()
    }
    for name, layer in _expert_layers(model).items():
        by_expert = grads[name].mT if layer.get_base_layer().is_transposed else grads[name]
        for index, grad in enumerate(by_expert):
            found[f"{name}[{index}]"] = Reference.of(grad, expert_rows[name, index])
    return found


def _rows_of_experts(model, run_backward):
    """Return inputs and output gradients of the tokens that each expert gets, by layer and number of the expert.

    Every expert is run on every token, and what the router does not send to it is left out of the result.
    """
    names = {}
    for name, layer in _expert_layers(model).items():
        names.setdefault(layer.get_base_layer(), {})[layer.parameter_name] = name
    rows = {
        (name, index): ([], [])
        for experts in names
        for name in names[experts].values()
        for index in range(experts.num_experts)
    }

    def apply(experts, parameter, index, x, routed):
        weight, bias = getattr(experts, parameter)[index], getattr(experts, f"{parameter}_bias", None)
        y = x @ (weight if experts.is_transposed else weight.mT)
        y = y if bias is None else y + bias[index]
        if parameter in names[experts]:
            inputs, grads = rows[names[experts][parameter], index]
            inputs.append(x.detach()[routed])
            y.register_hook(lambda grad: grads.append(grad[routed]))
        return y

    def on_all_tokens(experts):
        def forward(hidden, chosen, weights):
            result = torch.zeros_like(hidden)
            for index in range(experts.num_experts):
                routed = (chosen == index).any(-1)
                inner = experts._apply_gate(apply(experts, "gate_up_proj", index, hidden, routed))
                share = weights.masked_fill(chosen != index, 0).sum(-1, keepdim=True)
                result = result + share * apply(experts, "down_proj", index, inner, routed)
            return result

        return forward

    try:
        for experts in names:
            experts.forward = on_all_tokens(experts)
        run_backward()
    finally:
        for experts in names:
            del experts.forward
    return rows


def _expert_layers(model):
    """Return PEFT's layers of the parameters of all experts that carry adapters, by name."""
    wrappers = {name: module for name, module in lora_layers(model).items() if isinstance(module, ParamWrapper)}
    return {name: module for name, module in wrappers.items() if module.get_param().dim() == 3}


def expert_weights(model):
    return {name: layer.get_param() for name, layer in _expert_layers(model).items()}


def dense_updates(folder, ranks, step, config=None):
    """Compute ``step * D^ Q Q^T`` of each layer from stored statistics, by dense solves in numpy.

    Args:
        folder: A stored initialisation with statistics.
        ranks: By layer.
        step: By layer, or one for all.
        config: Dampings and weights; None: the stored ones.
    """
    manifest = load_init(folder).manifest
    config = config or manifest.config
    statistics = stored_statistics(folder)
    population = getattr(config, "population_size", None) or manifest.report.population_size
    norms = {name: np.linalg.norm(_dense_displacement(layer, config)[0], 2) for name, layer in statistics.items()}
    tokens = {name: layer.num_output_tokens for name, layer in statistics.items()}
    unit = max(norms[name] / tokens[name] for name in norms)
    updates = {}
    for name, rank in ranks.items():
        displacement = _dense_displacement(statistics[name], config)[0]
        _, vectors = np.linalg.eigh(dense_guidance(statistics[name], config, population))
        own_step = step[name] if isinstance(step, dict) else step
        divisor = norms[name] if config.layer_steps == "equal" else unit * tokens[name]
        updates[name] = own_step / divisor * displacement @ vectors[:, :rank] @ vectors[:, :rank].T
    return updates


def dense_guidance(statistics, config, population):
    """Compute the matrix whose lowest eigenvectors are the rows of A."""
    displacement, inverse, inverse_output = _dense_displacement(statistics, config)
    return config.variance_weight * inverse_output.sum() / population * inverse - displacement.T @ displacement


def _dense_displacement(statistics, config):
    """Compute D, and the inverses of the damped factors that are in it."""
    moment = statistics.input_second_moment.double().numpy()
    diagonal = statistics.output_grad_second_moment_diag.double().numpy()
    inverse = np.linalg.inv(moment + _dense_damping(config.input_damping, moment.diagonal()) * np.eye(len(moment)))
    inverse_output = 1 / (diagonal + _dense_damping(config.output_damping, diagonal))
    return -inverse_output[:, None] * statistics.weight_grad.double().numpy() @ inverse, inverse, inverse_output


def _dense_damping(setting, diagonal):
    amount, _, reference = str(setting).partition("*")
    return float(amount) * (getattr(np, reference)(diagonal) if reference else 1.0)


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
