"""Heads that are trained beside an adapter (`modules_to_save`): fitted first, or taken over from what is stored."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_da_hf.adapters.targets import base_name
from lora_da_hf.adapters.trial import adapters_off
from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import ADAPTER_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.distributed.parameters import full_shape, read_full, settle, write_full
from lora_da_hf.errors import WriteError
from lora_da_hf.losses import base_model_of
from lora_da_hf.pipeline.base_model import head_parameters, trained_heads
from lora_da_hf.pipeline.job import Job, apart
from lora_da_hf.pipeline.probe import Probe
from lora_da_hf.statistics.batches import sample_length
from lora_da_hf.statistics.collect import Batch, PassSettings, in_batches
from lora_da_hf.statistics.model_state import without_checkpointing
from lora_da_hf.theory.line_search import Losses

_RIDGE_RATIO = 10**0.5
_MOST_RIDGES = 20
_ITERATIONS = 10
"""Of L-BFGS at each ridge, from where the last one ended."""

_HELD_OUT = 4
"""One of so many samples decides on the ridge."""

_MOST_BYTES = 2**32
"""Of features, on all processes together. As many samples are taken as they suffice for."""

_Features = tuple[Batch, list[Any]]
"""A batch, and what each call of the backbone returned for it, on the CPU."""


def fit_heads(job: Job, probe: Probe, digests: list[str]) -> tuple[str, ...]:
    """Fit the heads that are trained beside the adapter, the rest of the model as it is; return what to note.

    ``digests`` are those of the samples, so that one that comes again is not held out where it was fitted to.

    The gradient of the layers below a head that is drawn at random says next to nothing of the task. The outputs of the
    backbone are computed once. On them L-BFGS minimises the loss plus a ridge towards the weights that the head has,
    ever weaker ones until the loss on a quarter of the samples, which are held out, rises. The strongest ridge is taken
    within the error of the best; the head stays as it is where that is within it too.
    """
    base, samples, adapter = base_model_of(job.model), probe.splits.heads, job.scan.adapter_name
    of_heads = head_parameters(job.model)
    wrappers: dict[str, Any] = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        if all(id(parameter) in of_heads for parameter in module.modules_to_save[adapter].parameters())
    }
    if not wrappers or not samples:
        return ()
    names = ", ".join(wrappers)
    if base.base_model is base:
        return (f"{names} was not fitted first: the model does not tell its backbone from its heads",)
    heads = trained_heads(job.model, adapter)
    settings = dataclasses.replace(probe.settings, around_loss=contextlib.nullcontext)
    with job.stage("heads"), contextlib.ExitStack() as replaced:
        write_heads(heads, job.processes.broadcast({name: read_full(head).cpu() for name, head in heads.items()}, 0))
        with adapters_off(job.scan.targets):
            samples = samples[: _number_that_fits(job, samples, settings)]
            held = set(list(dict.fromkeys(digests[: len(samples)]))[1::_HELD_OUT])
            is_held = [digest in held for digest in digests]
            held_out, fitted = ([s for s, h in zip(samples, is_held, strict=False) if h == w] for w in (True, False))
            parts = ((fitted, settings), (held_out, apart(settings, len(held_out))))
            features = [in_batches(how, functools.partial(_read_features, job, part)) for part, how in parts]
        settle(job.model)  # FSDP2 has other parameters after a pass than before
        replay = _Replay(base.base_model)
        replaced.enter_context(_in_place_of(base, base.base_model_prefix, replay))
        copies: dict[int, nn.Parameter] = {}
        for wrapper in wrappers.values():
            head = _WholeCopy(wrapper.modules_to_save[adapter])
            copies |= head.parameter_of
            replaced.enter_context(_in_place_of(wrapper.modules_to_save, adapter, head))
        on_fitted, on_held_out = (functools.partial(_losses, job, settings, replay, part) for part in features)
        before, after = _minimise(on_fitted, on_held_out, list(copies.values()))
    if after is before:
        return (f"{names} was not fitted first: on {len(held_out)} samples that would be no gain beyond its error",)
    settle(job.model)
    heads = trained_heads(job.model, adapter)  # of FSDP2, others than before the pass
    write_heads(heads, {name: copies[id(parameter)].detach() for name, parameter in heads.items()})
    losses = f"loss {before.mean:.4f} -> {after.mean:.4f} on {len(held_out)} others"
    note = f"{names} was fitted first, on {len(fitted)} samples: {losses}"
    job.say(f"LoRA-DA: {note}")
    return (note,)


def _number_that_fits(job: Job, samples: Sequence[Any], settings: PassSettings) -> int:
    """Return for how many samples there is room, by what the backbone returns for the longest."""
    longest = in_batches(settings, functools.partial(_read_features, job, [max(samples, key=sample_length)]))
    leaves = tree_leaves([(batch.inputs, outputs) for batch, outputs in longest])
    num_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    return max(2 * _HELD_OUT, _MOST_BYTES // max(1, *job.processes.gather(num_bytes)))


def _read_features(job: Job, samples: Sequence[Any], settings: PassSettings) -> list[_Features]:
    """Return this process's batches with what the backbone returned for each, on the CPU."""
    returned: list[Any] = []
    hook = base_model_of(job.model).base_model.register_forward_hook(lambda *call: returned.append(call[-1]))
    features: list[_Features] = []
    with torch.no_grad(), without_checkpointing(job.model), hook:
        for batch in settings.batches(job.processes.share(samples)):
            if batch.is_run:
                settings.loss(batch)
                inputs, outputs = send_to_device((dict(batch.inputs), list(returned)), "cpu")
                features.append((dataclasses.replace(batch, inputs=inputs), outputs))
                returned.clear()
    return features


class _Replay(nn.Module):
    """Stands in for the backbone, and returns what that returned before, call by call."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.outputs: Iterator[Any] = iter(())
        self.__dict__["backbone"] = backbone  # beside the modules

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the next output."""
        return next(self.outputs)


class _WholeCopy(nn.Module):
    """A copy of a head, whole on each process, in float64: the fit does not depend on how the samples are shared.

    Attributes:
        parameter_of: The copy of each parameter, by the identity of the original.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.parameter_of = {id(p): nn.Parameter(read_full(p).double()) for p in head.parameters()}
        hooks = [hooks for module in head.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self.copy = copy.deepcopy(head, {**self.parameter_of, **{id(found): OrderedDict() for found in hooks}})
        self.copy.double()  # buffers too

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy in its precision, which autocast leaves alone, for a loss whose own tensors are of float32."""

        def cast(value: Any, dtype: torch.dtype) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(functools.partial(cast, dtype=torch.float64), (args, kwargs))
        with torch.autocast(next(self.copy.parameters()).device.type, enabled=False):
            return tree_map(functools.partial(cast, dtype=torch.float32), self.copy(*args, **kwargs))


@contextlib.contextmanager
def _in_place_of(holder: nn.Module, name: str, module: nn.Module) -> Generator[None]:
    before = holder._modules[name]
    holder._modules[name] = module
    try:
        yield
    finally:
        holder._modules[name] = before


def _losses(
    job: Job,
    settings: PassSettings,
    replay: _Replay,
    features: list[_Features],
    parameters: Sequence[nn.Parameter] = (),
) -> Losses:
    """Return the loss over all processes' features, and leave its gradient in the parameters."""
    mine: list[tuple[float, int]] = []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch, outputs in features:
        inputs, outputs = send_to_device((batch.inputs, outputs), job.collate.device)
        replay.outputs = iter(outputs)
        with torch.set_grad_enabled(bool(parameters)):
            loss = settings.loss(dataclasses.replace(batch, inputs=inputs))
        if parameters and loss.requires_grad:
            (loss * batch.weight).backward()
        if batch.num_items:
            mine.append((loss.item() * batch.weight, batch.num_items))
    found = Losses(tuple(batch for part in job.processes.gather(mine) for batch in part))
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        job.processes.all_sum_(gradient)
        gradient /= sum(num_items for _, num_items in found.batches)
    return found


def _minimise(
    on_fitted: Callable[..., Losses], on_held_out: Callable[[], Losses], parameters: list[nn.Parameter]
) -> tuple[Losses, Losses]:
    """Leave the parameters at the ridge that what is held out chooses: the losses on it before, and after."""

    def values() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    path = [(on_held_out(), values())]
    loss, starts = on_fitted(parameters).mean, path[0][1]
    # at this ridge a loss that is linear would fall by all of it
    ridge = sum(p.grad.square().sum().item() for p in parameters if p.grad is not None) / (4 * abs(loss) or 1.0)

    def objective() -> float:
        value = on_fitted(parameters).mean
        for parameter, start in zip(parameters, starts, strict=True):
            away = parameter.detach() - start
            assert parameter.grad is not None  # on_fitted left it
            parameter.grad.add_(away, alpha=2 * ridge)
            value += ridge * away.square().sum().item()
        return value

    while ridge > 0 and len(path) <= _MOST_RIDGES:
        torch.optim.LBFGS(parameters, max_iter=_ITERATIONS, line_search_fn="strong_wolfe").step(objective)
        path.append((on_held_out(), values()))
        if not path[-1][0].mean < path[-2][0].mean:
            break
        ridge /= _RIDGE_RATIO
    best = min((losses for losses, _ in path if math.isfinite(losses.mean)), key=lambda x: x.mean, default=path[0][0])
    within = (step for step in path if step[0].mean <= best.mean + step[0].error_beside(best))
    taken, kept = next(within, path[0])  # where the loss is not finite the search says so
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return path[0][0], taken


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
    heads_of_adapter = trained_heads(model, adapter_name)
    values = {name: tensors[key] for name in heads_of_adapter if (key := stored_name(name, adapter_name)) in tensors}
    for name in [name for name, value in values.items() if value.shape != full_shape(heads_of_adapter[name])]:
        notes.append(f"the stored {stored_name(name, adapter_name)} has another shape and was left out")
        del values[name]
    before = {name: read_full(heads_of_adapter[name]) for name in values}
    changed = {name: value for name, value in values.items() if not value.to(before[name]).equal(before[name])}
    write_heads(heads_of_adapter, changed)
    if changed:
        modules = dict.fromkeys(name.removeprefix(PEFT_PREFIX).partition(infix)[0] for name in changed)
        notes.append(f"{', '.join(modules)} got the stored weights, which the statistics were taken with")
    return tuple(notes)


def stored_name(name: str, adapter_name: str) -> str:
    """Return the name under which PEFT stores a parameter of a head."""
    return PEFT_PREFIX + base_name(name).replace(f".modules_to_save.{adapter_name}.", ".")


def write_heads(heads: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Overwrite parameters of heads by their names, in their own dtypes."""
    for name, value in values.items():
        if not write_full(heads[name], value.to(heads[name].device, heads[name].dtype)):
            raise WriteError(f"{name} reads back differently from what was written: something else owns it.")
