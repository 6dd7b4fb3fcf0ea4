"""What is trained beside an adapter (`modules_to_save`), taken over from a stored initialisation."""

from __future__ import annotations

from torch import Tensor

from lora_da_hf.artifacts.adapter_config import PEFT_PREFIX
from lora_da_hf.artifacts.manifest import ADAPTER_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.distributed.parameters import full_shape, read_full, write_full
from lora_da_hf.errors import WriteError
from lora_da_hf.pipeline.base_model import head_parameters
from lora_da_hf.pipeline.job import Job


def take_over_saved_modules(job: Job, stored: StoredInit) -> None:
    """Give heads that are trained beside the adapter their stored weights, as PEFT does when it loads an adapter.

    The statistics are those of the model with these: a head that is drawn at random is another one each time the base
    is loaded. What the base has weights of its own for keeps those. Where a stored head has another shape, or is not
    trained beside this adapter, the model's own stays, and the report says so.

    Raises:
        WriteError: if what is read back is not what was written.
    """
    infix = f".modules_to_save.{job.scan.adapter_name}."
    heads = head_parameters(job.model)
    of_heads = [(name, parameter) for name, parameter in job.model.named_parameters() if id(parameter) in heads]
    if not of_heads:
        return
    named = [(name, parameter) for name, parameter in of_heads if infix in name]
    with job.ranks.together("reading of the initialisation"):
        tensors = read_tensors(stored.folder / ADAPTER_FILE, None)
    others = [name.removeprefix(PEFT_PREFIX) for name, _ in of_heads if infix not in name]
    left_out = [name for name in others if f"{PEFT_PREFIX}{name}" in tensors]
    if left_out:
        modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in left_out))
        job.report.notes.append(
            f"{modules}: trained beside the stored adapter and not beside this one, so the stored weights, which the "
            "statistics were taken with, were left out (LoraConfig's modules_to_save)"
        )
    replaced: list[str] = []
    with job.stage("write"), job.ranks.stage("write", has_collectives=job.runs_in_lockstep, known=WriteError):
        for name, parameter in named:
            module, _, weight = name.removeprefix(PEFT_PREFIX).partition(infix)
            value = tensors.get(f"{PEFT_PREFIX}{module}.{weight}")
            if value is None:
                continue
            if value.shape != full_shape(parameter):
                job.report.notes.append(f"the stored {weight} of {module} has another shape and was left out")
                continue
            before: Tensor = read_full(parameter)
            value = value.to(before)
            if not value.equal(before):
                job.replaced.append((parameter, before))
                replaced.append(module)
                if not write_full(parameter, value):
                    raise WriteError(
                        f"{name} reads back differently from what was written. Something else owns this parameter, or "
                        "its optimizer's copy of it."
                    )
    if replaced:
        modules = ", ".join(dict.fromkeys(replaced))
        job.report.notes.append(f"{modules} got the stored weights, which the statistics were taken with")
