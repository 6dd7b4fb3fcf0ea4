"""A model made ready for the pass, and put back exactly as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NOT_ITS_OWN = object()
_DIVIDES = "layers_are_rescaled"  # of RWKV, which divides its weights in place in evaluation mode
ROUTER_LOSS = "output_router_logits"
"""Option of a config by which a mixture of experts adds the auxiliary loss of its routers."""


@contextlib.contextmanager
def prepared_for_pass(model: nn.Module, *, seed: int) -> Generator[None]:
    """Freeze every parameter, turn dropout off and keep gradient checkpointing on; undo it all at the end.

    Gradient checkpointing needs train mode, so only the modules that checkpoint are put in it, with dropout at zero.
    Caches for generation are off, and so are the auxiliary losses of routers, which belong to a batch as a whole and
    not to the likelihood. What was compiled in place runs as it is written, since compiled code keeps what hooks did
    when it was traced. Random number generators are seeded.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state(seed))
        if any(_is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # a loss that switches adapters on and off thaws them; a gradient added to in place could not be put back
        for name, value in (("requires_grad", False), ("grad", None)):
            stack.enter_context(changed([(parameter, name, value) for parameter in model.parameters()]))
        stack.enter_context(changed(_evaluation_mode(model)))
        for option in ("use_cache", ROUTER_LOSS):
            stack.enter_context(changed([(config, option, False) for config in configs_with(model, option)]))
        stack.enter_context(_checkpoints_start_a_graph(model))
        yield


def _is_compiled(module: nn.Module) -> bool:
    return bool(module._compiled_call_impl) or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


@contextlib.contextmanager
def random_state(seed: int) -> Generator[None]:
    """Seed the global random number generators of Python, numpy and torch, and put them back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    kind = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
    devices = range(0 if kind == "mps" else torch.accelerator.device_count())  # MPS numbers no devices
    with torch.random.fork_rng(devices, device_type=kind):
        seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_generators(seed: int) -> None:
    """Seed the global random number generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules that do gradient checkpointing, by transformers' convention."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    return [module for module in on if callable(getattr(module, "_gradient_checkpointing_func", None))]


def apart_by_checkpoint(
    model: nn.Module, layers: Mapping[str, nn.Module], leaders: Mapping[str, str]
) -> dict[str, str]:
    """Let layers share an input only with those that reentrant gradient checkpointing runs again together with them.

    Each checkpoint gives its layers a tensor of its own then. ``leaders`` is what `find_shared_inputs` returned.
    """
    checkpoint_of: dict[nn.Module, int] = {}
    for number, module in enumerate(checkpointing_modules(model)):  # outer ones come first
        settings: Mapping[str, Any] = getattr(module._gradient_checkpointing_func, "keywords", {})
        if settings.get("use_reentrant", True):
            checkpoint_of.update(dict.fromkeys(module.modules(), number))
    found: dict[tuple[str, int | None], str] = {}
    return {name: found.setdefault((leader, checkpoint_of.get(layers[name])), name) for name, leader in leaders.items()}


def _evaluation_mode(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return what to change for evaluation mode, but for modules that checkpoint, which have their dropout at zero."""
    checkpoints = dict.fromkeys(checkpointing_modules(model))
    stay = {*checkpoints, *(module for module in model.modules() if hasattr(module, _DIVIDES))}
    changes: list[tuple[Any, str, Any]] = [(m, "training", m in stay) for m in model.modules()]
    for module in checkpoints:
        for holder in (module, getattr(module, "config", None)):  # Wav2Vec2 reads layerdrop from its config
            values = vars(holder) if holder is not None else {}
            changes += [(holder, k, 0.0) for k, v in values.items() if isinstance(v, float) and "drop" in k]
    return changes


@contextlib.contextmanager
def changed(changes: Sequence[tuple[Any, str, Any]]) -> Generator[None]:
    """Set attributes, ``(holder, name, value)``, and put back what they were; those of the class come out again."""
    before = [(holder, name, _own(holder, name)) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in reversed(before):
            if value is not _NOT_ITS_OWN:
                setattr(holder, name, value)
            elif name in vars(holder):
                delattr(holder, name)


def _own(holder: Any, name: str) -> Any:
    is_computed = hasattr(getattr(type(holder), name, None), "__set__")
    return getattr(holder, name) if is_computed else vars(holder).get(name, _NOT_ITS_OWN)


def without_checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """Turn gradient checkpointing off for passes without gradients, inside `prepared_for_pass`."""
    on = [module for module in checkpointing_modules(model) if module.training and not hasattr(module, _DIVIDES)]
    return changed([(module, "training", False) for module in on])


def configs_with(model: nn.Module, option: str) -> list[Any]:
    """Return those of the configs of a model and its parts, such as its language model, that have an option on."""
    found = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [config for config in found.values() if getattr(config, option, None)]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the embeddings of a model, if it has any: transformers raises for one of images or audio."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = get_embeddings() if callable(get_embeddings) else None
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _checkpoints_start_a_graph(model: nn.Module) -> AbstractContextManager[Any]:
    """Make the embeddings' output require a gradient: reentrant checkpointing drops the graph otherwise."""

    def require_grad(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_leaf and torch.is_grad_enabled():
            output.requires_grad_(True)

    embeddings = input_embeddings(model) if checkpointing_modules(model) else None
    return contextlib.nullcontext() if embeddings is None else embeddings.register_forward_hook(require_grad)
