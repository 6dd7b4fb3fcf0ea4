"""What is trained beside an adapter (`modules_to_save`), taken over from a stored initialisation."""

from __future__ import annotations

from torch import nn

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import ADAPTER_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.distributed.parameters import full_shape, read_full, write_full
from lora_da_hf.errors import WriteError
from lora_da_hf.pipeline.base_model import head_parameters


def trained_heads(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of heads that are trained beside an adapter, by their names."""
    heads = head_parameters(model)
    infix = f".modules_to_save.{adapter_name}."
    return {name: p for name, p in model.named_parameters() if id(p) in heads and infix in name}


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
