"""Heads that are trained beside an adapter (`modules_to_save`): fitted first, or taken over from what is stored."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import ADAPTER_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.distributed.parameters import full_shape, read_full, write_full
from lora_da_hf.errors import WriteError
from lora_da_hf.losses import base_model_of
from lora_da_hf.pipeline.base_model import head_parameters, trained_heads
from lora_da_hf.pipeline.job import Job
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.statistics.collect import PassSettings, read_batches
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.statistics.token_masks import SingleSamplesNeeded

_RIDGE_RATIO = 10**0.5
_MOST_RIDGES = 20
_ITERATIONS = 10
"""Of L-BFGS at each ridge, from where the last one ended."""

_HELD_OUT = 8
"""One of so many samples decides on the ridge."""

_Features = tuple[Mapping[str, Any], int, list[Any]]
"""A batch, the items that it counts, and what each call of the backbone returned for it."""


def fit_heads(job: Job, found: Probe) -> tuple[str, ...]:
    """Fit the heads that are trained beside the adapter, the rest of the model as it is; return what to note.

    The gradient of the layers below a head that is drawn at random says next to nothing of the task. The outputs of the
    backbone are computed once. On them L-BFGS minimises the loss plus a ridge towards the weights that the head has,
    ever weaker ones until the loss on an eighth of the samples, which are held out, rises. If no ridge lowers that
    loss, the head stays as it is.
    """
    base, wrappers, samples = base_model_of(job.model), _head_modules(job), found.splits.heads
    if not wrappers or not samples:
        return ()
    names = ", ".join(wrappers)
    if base.base_model is base:
        return (f"{names} was not fitted first: the model does not tell its backbone from its heads",)
    held_out, fitted = samples[::_HELD_OUT], [s for place, s in enumerate(samples) if place % _HELD_OUT]
    with job.stage("heads"), contextlib.ExitStack() as replaced:
        with adapters_off(job.scan.targets):
            features = [_read_features(job, part, found.settings) for part in (fitted, held_out)]
        replay = _Replay()
        replaced.enter_context(_in_place_of(base, base.base_model_prefix, replay))
        copies: dict[int, nn.Parameter] = {}
        for wrapper in wrappers.values():
            head = _WholeCopy(wrapper.modules_to_save[job.scan.adapter_name])
            copies |= head.parameter_of
            replaced.enter_context(_in_place_of(wrapper.modules_to_save, job.scan.adapter_name, head))
        on_fitted, on_held_out = (functools.partial(_loss, job, found.settings, replay, part) for part in features)
        before, after = _minimise(on_fitted, on_held_out, list(copies.values()))
    if not after < before:
        return (f"{names} was not fitted first: that did not lower the loss on {len(held_out)} samples, {before:.4f}",)
    for parameter in trained_heads(job.model, job.scan.adapter_name).values():
        if not write_full(parameter, copies[id(parameter)].detach().to(parameter.dtype)):
            raise WriteError(f"{names} reads back differently from what was written: something else owns it.")
    losses = f"loss {before:.4f} -> {after:.4f} on {len(held_out)} others"
    note = f"{names} was fitted first, on {len(fitted)} samples: {losses}"
    job.say(f"LoRA-DA: {note}")
    return (note,)


def _head_modules(job: Job) -> dict[str, Any]:
    """Return PEFT's wrappers of the heads that are trained beside the adapter."""
    heads, adapter = head_parameters(job.model), job.scan.adapter_name
    return {
        name: module
        for name, module in base_model_of(job.model).named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        if all(id(parameter) in heads for parameter in module.modules_to_save[adapter].parameters())
    }


def _read_features(job: Job, samples: Sequence[Any], settings: PassSettings) -> list[_Features]:
    """Return this process's batches with what the backbone returned for each, on the CPU."""
    own, lockstep = job.processes.share(samples), job.lockstep(list(samples))
    is_single = settings.reduction.kind == "unknown" or settings.why_single is not None
    batch_size = 1 if is_single else settings.batch_size
    returned: list[Any] = []
    hook = base_model_of(job.model).base_model.register_forward_hook(lambda *call: returned.append(call[-1]))
    features: list[_Features] = []
    try:
        with torch.no_grad(), without_checkpointing(job.model), hook:
            for batch, _, num_items, _ in read_batches(own, batch_size, job.collate, settings, lockstep):
                if num_items or lockstep.filler is not None:
                    settings.reduction.loss(job.compute_loss, job.model, batch)
                    features.append((batch, num_items, send_to_device(list(returned), "cpu")))
                    returned.clear()
    except SingleSamplesNeeded as reason:
        if batch_size == 1:
            raise
        return _read_features(job, samples, dataclasses.replace(settings, why_single=str(reason)))
    return features


class _Replay(nn.Module):
    """Stands in for the backbone, and returns what that returned before, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: Iterator[Any] = iter(())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next output."""
        return next(self.outputs)


class _WholeCopy(nn.Module):
    """A copy of a head, whole on each process and in float32, which autocast leaves alone.

    Attributes:
        parameter_of: The copy of each parameter, by the identity of the original.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.parameter_of = {id(p): nn.Parameter(read_full(p).float()) for p in head.parameters()}
        hooks = [hooks for module in head.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self.copy = copy.deepcopy(head, {**self.parameter_of, **{id(found): OrderedDict() for found in hooks}})

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the copy in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.copy(features.float(), *args, **kwargs)


@contextlib.contextmanager
def _in_place_of(holder: nn.Module, name: str, module: nn.Module) -> Generator[None]:
    before = holder._modules[name]
    holder._modules[name] = module
    try:
        yield
    finally:
        holder._modules[name] = before


def _loss(
    job: Job,
    settings: PassSettings,
    replay: _Replay,
    features: list[_Features],
    parameters: Sequence[nn.Parameter] = (),
) -> float:
    """Return the mean loss over all processes' features, and leave its gradient in the parameters."""
    total = count = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch, num_items, outputs in features:
        replay.outputs = iter(send_to_device(outputs, job.collate.device))
        with torch.set_grad_enabled(bool(parameters)):
            loss = settings.reduction.loss(job.compute_loss, job.model, batch)
        weight = settings.reduction.weight(num_items) if num_items else 0.0
        if parameters:
            (loss * weight).backward()
        total, count = total + loss.item() * weight, count + num_items
    total, count = job.processes.sum((total, count))
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        job.processes.all_sum_(gradient)
        gradient /= count
    return total / count


def _minimise(
    on_fitted: Callable[..., float], on_held_out: Callable[[], float], parameters: list[nn.Parameter]
) -> tuple[float, float]:
    """Leave the parameters at the ridge with the lowest loss on what is held out: that loss before, and after."""
    starts = [parameter.detach().clone() for parameter in parameters]
    before = best = on_held_out()
    loss, kept = on_fitted(parameters), starts
    # at this ridge a loss that is linear would fall by all of it
    ridge = sum(p.grad.square().sum().item() for p in parameters if p.grad is not None) / (4 * abs(loss) or 1.0)

    def objective() -> float:
        value = on_fitted(parameters)
        for parameter, start in zip(parameters, starts, strict=True):
            away = parameter.detach() - start
            assert parameter.grad is not None  # on_fitted left it
            parameter.grad.add_(away, alpha=2 * ridge)
            value += ridge * away.square().sum().item()
        return value

    for _ in range(_MOST_RIDGES if ridge > 0 else 0):
        torch.optim.LBFGS(parameters, max_iter=_ITERATIONS, line_search_fn="strong_wolfe").step(objective)
        found = on_held_out()
        if not found < best:
            break
        best, kept = found, [parameter.detach().clone() for parameter in parameters]
        ridge /= _RIDGE_RATIO
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return before, best


def take_over_saved_modules(model: nn.Module, adapter_name: str, stored: StoredInit) -> tuple[str, ...]:
    """Give heads that are trained beside the adapter their stored weights, as PEFT does when it loads an adapter.

    The statistics are those of the model with these: a head that is drawn at random is another one each time the base
    is loaded. What the base has weights of its own for keeps those. Return notes on what got them and what could not.
    """
    infix = f".modules_to_save.{adapter_name}."
    heads = head_parameters(model)
    of_heads = {name: p for name, p in model.named_parameters() if id(p) in heads}
    if not of_heads:
        return ()
    tensors = read_tensors(stored.folder / ADAPTER_FILE, None)
    others = [name.removeprefix(PEFT_PREFIX) for name in of_heads if infix not in name]
    left_out = [name.rpartition(".")[0] for name in others if f"{PEFT_PREFIX}{name}" in tensors]
    notes: list[str] = []
    if left_out:
        notes.append(
            f"{', '.join(dict.fromkeys(left_out))}: trained beside the stored adapter and not beside this one, so the "
            "stored weights, which the statistics were taken with, were left out (LoraConfig's modules_to_save)"
        )
    replaced: dict[str, None] = {}
    for name, parameter in trained_heads(model, adapter_name).items():
        module, _, weight = name.removeprefix(PEFT_PREFIX).partition(infix)
        value = tensors.get(f"{PEFT_PREFIX}{module}.{weight}")
        if value is None:
            continue
        if value.shape != full_shape(parameter):
            notes.append(f"the stored {weight} of {module} has another shape and was left out")
            continue
        before = read_full(parameter)
        if not (value := value.to(before)).equal(before):
            replaced[module] = None
            if not write_full(parameter, value):
                raise WriteError(f"{name} reads back differently from what was written: something else owns it.")
    if replaced:
        notes.append(f"{', '.join(replaced)} got the stored weights, which the statistics were taken with")
    return tuple(notes)
