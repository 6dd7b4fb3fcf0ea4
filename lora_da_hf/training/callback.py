"""The initialisation as a callback, for `transformers.Trainer` and everything derived from it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_da_hf.adapters.afterwards import freeze_a, mark_initialized, was_initialized
from lora_da_hf.adapters.resizing import CANNOT_RESIZE
from lora_da_hf.adapters.targets import active_adapter_name
from lora_da_hf.artifacts.folders import atomic_folder, check_replaceable
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, INIT_FOLDER, MANIFEST_FILE, REPORT_FILE
from lora_da_hf.artifacts.store import load_manifest
from lora_da_hf.collator import RawCollate
from lora_da_hf.config import LoRADAConfig, checked_config
from lora_da_hf.distributed.parameters import is_partitioned
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import ConfigError, DataError, UnsupportedSetupError
from lora_da_hf.losses import input_device
from lora_da_hf.pipeline import apply_init, initialize_lora_da
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.report import LoRADAReport
from lora_da_hf.samples import has_positions, reads_once, samples_of_loader, with_columns_of
from lora_da_hf.training.init_source import find_init, tag_with_init
from lora_da_hf.training.parallelism import refuse_unsupported_parallelism
from lora_da_hf.training.trainer_loss import TrainerLoss, adapt_loss, metrics_kept, no_averaging_over_devices

logger = logging.getLogger(__name__)

USE_FOLDER = "lora_da_init_from"
"""For the report of a run with `init_from`, where `INIT_FOLDER` holds an initialisation."""

_MODEL_LOSS = "nll"
_SURROGATE = "dft"
"""Of which the value may rise as training goes on, so that the model's own loss serves a search better."""
_OF_ONLINE_RL = "num_generations"
_USE_OURS = " In one process or under DDP, LoRADATrainer does it before it makes its optimizer."


class LoRADACallback(TrainerCallback):
    """Initialises the LoRA adapter from the training data after everything is prepared, before the first step.

    It runs once for each model object: not on a resumed run, not on a second ``train()``, but again for a new
    model from ``model_init``. The initialisation is written to ``output_dir/lora_da``.

    A ``rank_budget`` is refused, since the layers' ranks cannot change any more by then: `LoRADATrainer` has it, and
    `initialize_lora_da` before the trainer is made.

    With ``init_from`` there is no pass over data: the adapter starts from a stored initialisation, and only the report
    is written: to that folder or, where it holds an initialisation, to ``output_dir/lora_da_init_from``. The model gets
    a tag ``lora_da_init:<repo@commit>``, which Trainer, TRL and PEFT put on its card.

    A callback does not get the trainer. Give it ``compute_loss=trainer.compute_loss`` (or set the attribute after the
    trainer was made) if the trainer's loss is not the one that the model returns; `LoRADATrainer` does that by itself.

    Attributes:
        compute_loss: The loss, as `Trainer.compute_loss`; None: what the model returns.
        report: What the last initialisation did; None before.
        on_report: Called with the report once it is there.

    Args:
        config: The settings; None: ``LoRADAConfig()``.
        compute_loss: See above.
        train_dataset: Where samples come from; None: the data set of the trainer's data loader. N is the length of the
            latter, unless the config says it.
        data_collator: Makes batches; None: the data loader's.
        adapter_name: The adapter, which must be the active one (another is an error); None: that one.
        init_from: A stored initialisation to start from: a folder, or ``user/repo@revision`` on the Hub.
        search_step: With ``init_from``: search the step anew on the training data, instead of taking the stored one.

    Raises:
        ConfigError: if ``search_step`` is given without ``init_from``, or ``config`` is no `LoRADAConfig`.
    """

    def __init__(
        self,
        config: LoRADAConfig | None = None,
        *,
        compute_loss: TrainerLoss | None = None,
        train_dataset: Any = None,
        data_collator: RawCollate | None = None,
        adapter_name: str | None = None,
        init_from: str | Path | None = None,
        search_step: bool = False,
    ) -> None:
        if search_step and init_from is None:
            raise ConfigError("search_step needs init_from: without it the config's step_size says how it is found.")
        self.config = checked_config(config)
        self.init_from = init_from
        self.search_step = search_step
        self.compute_loss = compute_loss
        self.train_dataset = train_dataset
        self.data_collator = data_collator
        self.adapter_name = adapter_name
        self.report: LoRADAReport | None = None
        self.on_report: Callable[[LoRADAReport], None] | None = None
        self._is_training = False
        self._is_unlogged = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Freeze A, if that is asked for, before the trainer makes its optimizer."""
        if self.config.freeze_a and model is not None:
            freeze_a(model, self.adapter_name)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialise the adapter, unless this run resumes another or the model was initialised already."""
        if model is None:
            raise DataError("The trainer handed no model to its callbacks. Use initialize_lora_da before training.")
        folder = Path(args.output_dir or ".") / INIT_FOLDER
        refuse_unsupported_parallelism(args)
        name = self.adapter_name or active_adapter_name(model)
        starts_over, self._is_training = self._is_training, True  # as auto_find_batch_size does
        if self.config.freeze_a:
            self._freeze_a_late(model, name, kwargs.get("optimizer"))
        if state.global_step > 0:
            logger.info("LoRA-DA: resuming at step %d, the adapter stays as it is", state.global_step)
            _unload_init(model, name, folder.parent)
            mark_initialized(model, name, may_be_zero=True)
            self._recall_report(folder if self.init_from is None else _folder_of_report(folder))
            self._tag(model, self.report)
            return
        if was_initialized(model, name):
            if self.report is None:
                self._note_what_is_ignored()
            else:
                logger.info("LoRA-DA: this model's adapter was initialised before, it stays as it is")
            if self.report is not None and (starts_over or self._is_unlogged):
                self._log(self.report, state)
            return
        if self.config.rank_budget is not None and self.init_from is None:
            raise UnsupportedSetupError(
                CANNOT_RESIZE.format("The trainer's optimizer holds the adapter's parameters") + _USE_OURS
            )
        self.report = self._initialize(args, state, model, name, train_dataloader)
        self._log(self.report, state)

    def spends_budget(self, model: nn.Module) -> bool:
        """Tell whether a model's layers are still to get their ranks from a budget, before the optimizer is made."""
        if self.config.rank_budget is None or self.init_from is not None:
            return False
        return not was_initialized(model, self.adapter_name or active_adapter_name(model))

    def initialize_early(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, train_dataloader: Any
    ) -> None:
        """Initialise before the optimizer is made. The report is logged when training begins."""
        refuse_unsupported_parallelism(args)
        name = self.adapter_name or active_adapter_name(model)
        self.report = self._initialize(args, state, model, name, train_dataloader)
        self._is_unlogged = True

    def _initialize(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, name: str, train_dataloader: Any
    ) -> LoRADAReport:
        _refuse_names(model)
        if self.init_from is None and self.train_dataset is None and hasattr(args, _OF_ONLINE_RL):
            raise UnsupportedSetupError(
                "This trainer makes its completions itself (GRPO, RLOO), so there is no loss on its data set. Give "
                "LoRADACallback a train_dataset of samples with labels and a data_collator, or init_from."
            )
        folder = Path(args.output_dir or ".") / INIT_FOLDER
        settings: dict[str, Any] = {
            "config": self.config,
            "adapter_name": name,
            "device": input_device(model) if _is_dispatched(model) else args.device,
            "progress": not args.disable_tqdm,
        }
        if self.init_from is None or self.search_step:
            samples, settings["data_collator"], population_size = self._data(train_dataloader)
            self._note_unseen_loss(args)
            settings["compute_loss"] = None if self.compute_loss is None else adapt_loss(self.compute_loss)
            batch_size = state.train_batch_size or args.train_batch_size
            settings["batch_size"] = max(1, batch_size // max(1, args.n_gpu))  # the pass has one of DataParallel's GPUs
        else:
            samples, population_size = None, None
        with no_averaging_over_devices(args), metrics_kept(self.compute_loss):
            if self.init_from is None:
                settings |= {"population_size": population_size, "seed": args.seed}
                report = initialize_lora_da(model, samples, output_dir=folder, **settings)
            else:
                report = self._apply(self.init_from, model, samples, folder, settings)
        self._tag(model, report)
        logger.info("%s", report)
        return report

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that training came to its end."""
        self._is_training = False

    def _data(self, train_dataloader: Any) -> tuple[Any, RawCollate | None, int | None]:
        """Return samples and collator, those that were given or the data loader's, and N where samples were given."""
        samples, collator = samples_of_loader(train_dataloader) if train_dataloader is not None else (None, None)
        population_size: int | None = None
        if self.train_dataset is not None:
            population_size = len(samples) if samples is not None and has_positions(samples) else None
            samples = self.train_dataset if self.data_collator else with_columns_of(self.train_dataset, samples)
        elif samples is None:
            raise DataError("The trainer has no train_dataloader. Give LoRADACallback a train_dataset.")
        elif reads_once(samples):
            raise DataError(
                "The training data is a stream that can be read once only: what the initialisation reads, training "
                "would miss. Let its __iter__ return a new iterator each time, or give LoRADACallback a train_dataset "
                "of its own."
            )
        return samples, self.data_collator or collator, population_size

    def _apply(
        self, init_from: str | Path, model: nn.Module, samples: Any, folder: Path, settings: dict[str, Any]
    ) -> LoRADAReport:
        """Start from the stored initialisation, and leave the report where a resumed run finds it."""
        ranks = Ranks.current()
        with ranks.together("look at the output folder"):
            if ranks.is_main:
                check_replaceable(_folder_of_report(folder))
        is_pulled = any(ranks.gather(not Path(init_from).is_dir()))
        with ranks.stage("fingerprint", has_collectives=is_partitioned(model)):  # not below: a pull may fail in one
            facts = base_model_facts(model) if is_pulled else None
        with ranks.together("search for the initialisation"):
            init = find_init(init_from, facts)
        report = apply_init(model, init, samples=samples, **settings)
        with ranks.together("writing of the report"):
            if ranks.is_main:
                with atomic_folder(_folder_of_report(folder)) as partial:
                    dataclasses.replace(report, artifact=None).save(partial / REPORT_FILE)  # no local path
        return report

    def _tag(self, model: nn.Module, report: LoRADAReport | None) -> None:
        """Let the cards that are written for the model say what it started from."""
        if report is not None and report.init_from is not None:
            tag_with_init(model, report.init_from)

    def _log(self, report: LoRADAReport, state: TrainerState) -> None:
        self._is_unlogged = False
        if self.on_report is not None:
            self.on_report(report)
        else:
            state.log_history.append({**report.metrics(), "step": state.global_step})

    def _freeze_a_late(self, model: nn.Module, name: str, optimizer: Any) -> None:
        """Freeze A of a model that was made after `on_init_end`, and take it out of an optimizer that was given it.

        Raises:
            ConfigError: if there are several processes, which count on A's gradient by now.
        """
        late = freeze_a(model, name)
        if late and (Ranks.current().size > 1 or optimizer is None):
            raise ConfigError(
                "freeze_a came too late: the optimizer has A already. Give LoRADACallback to the trainer when it is "
                "made, and with model_init use LoRADATrainer."
            )
        for group in getattr(optimizer, "param_groups", ()):
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]

    def _recall_report(self, folder: Path) -> None:
        try:
            is_own = (folder / MANIFEST_FILE).is_file()
            self.report = load_manifest(folder).report if is_own else LoRADAReport.load(folder / REPORT_FILE)
            self.report.artifact = None if self.report.init_from else str(folder)
        except FileNotFoundError:
            logger.info("LoRA-DA: %s has no report of the initialisation", folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("LoRA-DA: the report in %s cannot be read (%s); training goes on without it", folder, error)

    def _note_what_is_ignored(self) -> None:
        """Say that an adapter which was not initialised by this callback stays as it is.

        Raises:
            ConfigError: if an initialisation was to be read.
        """
        if self.init_from is not None:
            raise ConfigError(
                f"The model's adapter was initialised before in this process, so init_from={str(self.init_from)!r} "
                "would not be used. Load the base anew, or leave init_from out to train the adapter as it is."
            )
        logger.warning(
            "LoRA-DA: the model's adapter was initialised before in this process and stays as it is; the settings "
            "given now have no effect. Load the base anew to start again."
        )

    def _note_unseen_loss(self, args: TrainingArguments) -> None:
        if self.compute_loss is not None or hasattr(args, _OF_ONLINE_RL):
            return
        loss_type = getattr(args, "loss_type", _MODEL_LOSS)  # of TRL
        unseen = "label smoothing" if args.label_smoothing_factor else None
        if loss_type not in (_MODEL_LOSS, _SURROGATE):
            names = loss_type if isinstance(loss_type, list) else [loss_type]
            unseen = f"loss_type {', '.join(map(str, names))}"
        if unseen:
            logger.warning(
                "LoRADACallback uses the loss that the model returns, without %s. Set its compute_loss to "
                "trainer.compute_loss to use the trainer's.",
                unseen,
            )


def _folder_of_report(folder: Path) -> Path:
    """Return where the report of a run with `init_from` goes: beside an initialisation that is there, never over it."""
    return folder.with_name(USE_FOLDER) if (folder / MANIFEST_FILE).exists() else folder


def _refuse_names(model: nn.Module) -> None:
    """Refuse a model with an adapter that would be saved where the initialisation is.

    Raises:
        ConfigError: naming it.
    """
    names = {INIT_FOLDER, USE_FOLDER}.intersection(getattr(model, "peft_config", {}))
    if names:
        raise ConfigError(
            f"An adapter is called {min(names)!r}, so trainers save it in a folder of that name in output_dir, and the "
            "initialisation is kept there: one would replace the other. Give the adapter another name."
        )


def _unload_init(model: Any, name: str, output_dir: Path) -> None:
    """Take the initialisation out of a resumed model, if it was loaded as an adapter beside the one that is trained.

    Trainer does that where it resumes from output_dir itself: it takes each folder with adapter weights there for an
    adapter of the model, and would save this one over the initialisation, without a manifest that fits. Before
    transformers 5.23 it then leaves out the trained adapter, which lies in output_dir itself.
    """
    if name != INIT_FOLDER and INIT_FOLDER in getattr(model, "peft_config", {}):
        model.delete_adapter(INIT_FOLDER)
        if (output_dir / ADAPTER_FILE).is_file():
            model.load_adapter(str(output_dir), name, is_trainable=True)


def _is_dispatched(model: nn.Module) -> bool:
    return getattr(model, "hf_device_map", None) is not None
