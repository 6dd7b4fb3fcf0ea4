"""The initialisation as a callback, for `transformers.Trainer` and everything derived from it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, compare_versions
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_da_hf.adapters.targets import active_adapter_name
from lora_da_hf.adapters.write import freeze_a, mark_initialized, was_initialized
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, INIT_FOLDER
from lora_da_hf.artifacts.store import StoredInit, is_repo_id, load_manifest
from lora_da_hf.collator import RawCollate
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.distributed.parameters import NOT_SPLIT
from lora_da_hf.errors import ArtifactError, ConfigError, DataError, HubError, UnsupportedSetupError
from lora_da_hf.losses import as_in_training_alone, base_model_of, input_device, loss_of
from lora_da_hf.pipeline import apply_init, initialize_lora_da
from lora_da_hf.report import LoRADAReport
from lora_da_hf.samples import has_positions, samples_of_loader, with_columns_of

logger = logging.getLogger(__name__)

START_FILE = "lora_da_init_from.json"

_OF_ONLINE_RL = "num_generations"


class LoRADACallback(TrainerCallback):
    """Initialises the LoRA adapter from the training data when training begins, before the first step.

    It runs once for each model object, and not on a resumed run. The initialisation is written to
    ``output_dir/lora_da``, and ``report`` says what it did.

    ``callback.attach(trainer)``, in place of ``callbacks=[callback]``, takes the trainer's own loss and sends the
    metrics to all of its loggers; without it the loss is the one that the model returns.

    Args:
        config: The settings; None: ``LoRADAConfig()``.
        train_dataset: Where samples come from; None: the data set of the trainer's data loader.
        data_collator: Makes batches; None: the data loader's.
        init_from: A stored initialisation to start from: a folder, or ``user/repo@revision`` on the Hub. An attached
            callback measures the loss before and after on a few samples. The report is written to
            ``output_dir/lora_da_init_from.json``, and the model's cards cite the initialisation.
        search_step: With ``init_from``: search the step anew on the training data, instead of taking the stored one.

    Raises:
        ConfigError: if ``search_step`` is given without ``init_from``, or the settings are not a LoRADAConfig.
    """

    def __init__(
        self,
        config: LoRADAConfig | None = None,
        *,
        train_dataset: Any = None,
        data_collator: RawCollate | None = None,
        init_from: str | Path | None = None,
        search_step: bool = False,
    ) -> None:
        if search_step and init_from is None:
            raise ConfigError("search_step needs init_from: without it the config's step_size says how it is found.")
        self.config = LoRADAConfig.of(config)
        self.init_from = init_from
        self.search_step = search_step
        self.train_dataset = train_dataset
        self.data_collator = data_collator
        self.report: LoRADAReport | None = None
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> LoRADACallback:
        """Join a trainer, which may have no other `LoRADACallback`, and use its loss and its loggers."""
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, LoRADACallback) and c is not self]
        if others:
            raise ConfigError("The trainer has a LoRADACallback already. Give it one, with all its settings.")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        self.freeze(trainer.model)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze A, if that is asked for, before the trainer makes its optimizer."""
        self.freeze(kwargs.get("model"))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialise the adapter, unless this run resumes another or the model was initialised already."""
        _refuse_unsupported_parallelism(args)
        name = active_adapter_name(model)
        if name == INIT_FOLDER and self.init_from is None:
            raise ConfigError(f"Trainer would save the adapter {name!r} over the initialisation. Give it another name.")
        self.freeze(model)
        if state.global_step > 0:
            self._resume(args, model, name)
        elif not was_initialized(model, name):
            self.report = self._initialize(args, state, model, train_dataloader)
        elif self.report is None:
            logger.warning(
                "LoRA-DA: the model's adapter was initialised before in this process and stays as it is; the settings "
                "given now have no effect. Load the base anew to start again."
            )
        base: Any = base_model_of(model)
        if self.report is not None and self.report.init_from is not None and isinstance(base, PreTrainedModel):
            base.add_model_tags([f"lora_da_init:{self.report.init_from}"])  # for every card that is written for it
        if self.report is not None and state.global_step == 0:
            self._log(self.report, state)

    def freeze(self, model: Any) -> None:
        """Freeze A, if that is asked for."""
        if self.config.freeze_a and model is not None:
            freeze_a(model)

    def _initialize(self, args: TrainingArguments, state: TrainerState, model: Any, loader: Any) -> LoRADAReport:
        dispatched = getattr(model, "hf_device_map", None) is not None
        settings: dict[str, Any] = {
            "config": self.config,
            "device": input_device(model) if dispatched else args.device,
            "progress": not args.disable_tqdm,
        }
        samples, population_size, output_dir = None, None, Path(args.output_dir or ".")
        if self.init_from is None or self.search_step or self._can_measure(args, loader):
            samples, settings["data_collator"], population_size = self._data(args, state, loader)
            settings["compute_loss"] = self._loss(args)
            batch_size = state.train_batch_size or args.train_batch_size
            settings["batch_size"] = max(1, batch_size // max(1, args.n_gpu))  # the pass has one of DataParallel's GPUs
        with contextlib.nullcontext() if self._trainer is None else as_in_training_alone(self._trainer):
            if self.init_from is None:
                (output_dir / START_FILE).unlink(missing_ok=True)  # an earlier run's
                settings |= {"population_size": population_size, "seed": args.seed}
                return initialize_lora_da(model, samples, output_dir=output_dir / INIT_FOLDER, **settings)
            settings["step_size"] = "line_search" if self.search_step else None
            report = apply_init(model, find_init(self.init_from), samples=samples, **settings)
        if state.is_world_process_zero:
            output_dir.mkdir(parents=True, exist_ok=True)
            dataclasses.replace(report, artifact=None).save(output_dir / START_FILE)  # no local path
        return report

    def _can_measure(self, args: TrainingArguments, loader: Any) -> bool:
        """Tell whether a stored start can be measured: with the trainer's own loss, on data that is there."""
        samples = self.train_dataset or samples_of_loader(loader)[0]
        return self._trainer is not None and not hasattr(args, _OF_ONLINE_RL) and has_positions(samples)

    def _data(self, args: TrainingArguments, state: TrainerState, loader: Any) -> tuple[Any, RawCollate | None, int]:
        """Return samples, collator and N: the size of the training set, or of what training draws from a stream."""
        if self.init_from is None and self.train_dataset is None and hasattr(args, _OF_ONLINE_RL):
            raise UnsupportedSetupError(
                "This trainer makes its completions itself (GRPO, RLOO), so its data has no loss. Give "
                "LoRADACallback a train_dataset of samples with labels and a data_collator, or init_from."
            )
        samples, collator = samples_of_loader(loader)
        total = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        population_size = len(samples) if has_positions(samples) else max(1, state.max_steps * total)
        if self.train_dataset is not None:
            samples = self.train_dataset if self.data_collator else with_columns_of(self.train_dataset, samples)
        elif samples is None or (not has_positions(samples) and iter(samples) is iter(samples)):
            raise DataError(
                "The training data is a stream that can be read only once, or not known: its loader has no data set. "
                "Let its __iter__ return a new iterator each time, or give LoRADACallback a train_dataset."
            )
        return samples, self.data_collator or collator, population_size

    def _loss(self, args: TrainingArguments) -> Any:
        """Return the trainer's loss; None, the model's, where the callback was not attached or that need not fall."""
        loss_type = getattr(args, "loss_type", "nll")  # of TRL, whose dft may rise as training goes on
        falls = loss_type != "dft" and not hasattr(args, _OF_ONLINE_RL)
        if self._trainer is not None and falls:
            return loss_of(self._trainer)
        is_own = falls and loss_type != "nll"
        if is_own or args.label_smoothing_factor:
            logger.warning(
                "LoRA-DA uses the model's loss, without %s. Call callback.attach(trainer) for yours.",
                f"loss_type {loss_type}" if is_own else "label smoothing",
            )
        return None

    def _log(self, report: LoRADAReport, state: TrainerState) -> None:
        logger.info("%s", report)
        if state.is_local_process_zero:
            tqdm.write(_line(report))
        if self._trainer is not None:
            self._trainer.log(report.metrics())
        else:
            state.log_history.append({**report.metrics(), "step": state.global_step})

    def _resume(self, args: TrainingArguments, model: Any, name: str) -> None:
        """Leave the adapter as the checkpoint has it, and find the report of the run that is resumed.

        Trainer takes each folder with adapter weights in output_dir for an adapter of the model: it loads the
        initialisation too, and would save that over itself. Before transformers 5.23 it then leaves out the trained
        adapter, which lies in output_dir itself.
        """
        output_dir = Path(args.output_dir or ".")
        if name != INIT_FOLDER and INIT_FOLDER in getattr(model, "peft_config", {}):
            model.delete_adapter(INIT_FOLDER)
            if compare_versions("transformers", "<", "5.23") and (output_dir / ADAPTER_FILE).is_file():
                model.load_adapter(str(output_dir), name, is_trainable=True)
        mark_initialized(model, name, may_be_zero=True)
        stored = output_dir / (INIT_FOLDER if self.init_from is None else START_FILE)
        try:
            self.report = load_manifest(stored).report if self.init_from is None else LoRADAReport.load(stored)
        except (ArtifactError, OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("LoRA-DA: %s has no report to read (%s); training goes on without it", stored, error)


def _line(report: LoRADAReport) -> str:
    """Return what was done in one line."""
    before, after = report.unseen_loss_before, report.unseen_loss_after
    found = f"{len(report.layers)} layers"
    if before is not None and after is not None:
        found = f"held-out loss {before:.4f} -> {after:.4f}"
    step = "one a layer" if report.step_size is None else f"{report.step_size:.3g}"
    step = "0: B is zero, as in plain LoRA" if report.step_size == 0 else step
    start = report.artifact if (report.init_from or "").startswith("sha256:") else report.init_from
    source = f"from {start}" if start else f"{report.num_samples} samples"
    return f"LoRA-DA: {found} in {report.total_seconds:.0f} s ({source}, step {step})"


def find_init(init_from: str | Path) -> Path | StoredInit:
    """Return the folder of that name or, if there is none, what the Hub has under ``user/repo`` or with ``@revision``.

    Raises:
        ConfigError: if it is neither a folder nor the name of a repository.
        HubError: if the repository cannot be fetched.
    """
    if Path(init_from).is_dir():
        return Path(init_from)
    repo_id, _, revision = str(init_from).partition("@")
    if "/" not in repo_id or not is_repo_id(repo_id):
        raise ConfigError(f"init_from={str(init_from)!r} is neither a folder that exists nor user/repo@revision.")
    from lora_da_hf.hub import pull_init  # needed for this alone

    try:
        return pull_init(repo_id, revision=revision or None, statistics=False)
    except HubError as error:
        raise HubError(f"There is no folder {str(init_from)!r}, and on the Hub: {error}") from error


def _refuse_unsupported_parallelism(args: TrainingArguments) -> None:
    """Refuse all but data parallelism, and DeepSpeed in half precision without ZeRO."""
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    deepspeed: dict[str, Any] = getattr(getattr(state, "deepspeed_plugin", None), "deepspeed_config", None) or {}
    if getattr(state, "distributed_type", None) == DistributedType.MEGATRON_LM:
        raise UnsupportedSetupError(NOT_SPLIT.format("Megatron-LM"))
    configs = [getattr(owner, "parallelism_config", None) for owner in (args, state)]
    for kind, name, of_deepspeed in (
        ("tensor", "tp_size", deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)),
        ("context", "cp_size", 1),
        ("sequence", "sp_size", deepspeed.get("sequence_parallel_size", 1)),
    ):
        if max(of_deepspeed, *(getattr(config, name, None) or 1 for config in configs)) > 1:
            raise UnsupportedSetupError(NOT_SPLIT.format(f"{kind} parallelism"))
    is_half = args.bf16 or args.fp16 or any(deepspeed.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16"))
    if deepspeed and is_half and deepspeed.get("zero_optimization", {}).get("stage", 0) == 0:
        raise UnsupportedSetupError(
            "DeepSpeed without ZeRO (stage 0) keeps float32 copies of a half-precision adapter where they cannot be "
            "written, and its first step would undo the initialisation. Use stage 1, 2 or 3, or DDP."
        )
