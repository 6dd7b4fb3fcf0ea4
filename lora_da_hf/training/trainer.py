"""`Trainer` with a LoRA adapter that starts from the data."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from lora_da_hf.adapters.afterwards import freeze_a, mark_initialized
from lora_da_hf.adapters.resizing import CANNOT_RESIZE
from lora_da_hf.adapters.targets import active_adapter_name
from lora_da_hf.artifacts.adapter_config import INIT_LORA_WEIGHTS
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ConfigError, TargetError, UnsupportedSetupError
from lora_da_hf.pipeline.ranks_per_layer import adopt_ranks
from lora_da_hf.pipeline.save import refuse_unsaveable
from lora_da_hf.report import LoRADAReport
from lora_da_hf.training.callback import LoRADACallback
from lora_da_hf.training.init_source import cite_init


class LoRADATrainer(Trainer):
    """A drop-in for `transformers.Trainer` that initialises the LoRA adapter from the training data.

    It takes everything that `Trainer` takes. The initialisation uses the trainer's own data, collator, loss, precision
    and device, runs once before the first step, is logged, and is written to ``output_dir/lora_da``. It runs after
    ``on_train_begin`` of the callbacks that are given: what these copy there is the adapter before.

    Args:
        model: A plain model, with ``peft_config``, or a PEFT model with a fresh LoRA adapter.
        args: As for `Trainer`.
        trainer_args: Further positional arguments of `Trainer`.
        peft_config: How to wrap a plain model, or what ``model_init`` returns. It is copied, since a ``rank_budget``
            changes ranks in the model's.
        da_config: The settings of the initialisation; None: ``LoRADAConfig()``.
        init_from: A stored initialisation to start from instead: a folder, or ``user/repo@revision`` on the Hub. The
            card that the trainer writes cites it.
        search_step: With ``init_from``: search the step anew on the training data, instead of taking the stored one.
        trainer_kwargs: Keyword arguments of `Trainer`.

    Raises:
        ConfigError: if ``peft_config`` is given for a model that has an adapter, is no `LoraConfig`, or has a start of
            PEFT's that changes the base, or
            ``search_step`` is given without ``init_from``, or there is a `LoRADACallback` among the callbacks.
        TargetError: if the model has no LoRA layer and there is no ``peft_config``.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        peft_config: LoraConfig | None = None,
        da_config: LoRADAConfig | None = None,
        init_from: str | Path | None = None,
        search_step: bool = False,
        **trainer_kwargs: Any,
    ) -> None:
        given: Any = peft_config
        if given is not None and (not isinstance(given, LoraConfig) or given.peft_type != PeftType.LORA):
            raise ConfigError(f"peft_config is a {type(given).__name__}; LoRA-DA initialises LoRA: LoraConfig.")
        start = given.init_lora_weights if given is not None else True
        if (start.lower() if isinstance(start, str) else start) not in INIT_LORA_WEIGHTS:
            raise ConfigError(
                f"peft_config has init_lora_weights={start!r}, which changes the base's weights or "
                "makes B other than zero. LoRA-DA starts from a fresh adapter on the base as it is: leave it out."
            )
        self._forward_context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._lora_da = LoRADACallback(da_config, init_from=init_from, search_step=search_step)
        if model is not None:
            set_seed(args.seed if args is not None else TrainingArguments.seed)
            model = _with_adapter(model, peft_config)
        model_init = _bound_model_init(trainer_args, trainer_kwargs)
        if model_init is not None:
            position = _MODEL_INIT_POSITION
            wrapped = _wrap_model_init(model_init, peft_config)
            if "model_init" in trainer_kwargs:
                trainer_kwargs["model_init"] = wrapped
            else:
                trainer_args = (*trainer_args[:position], wrapped, *trainer_args[position + 1 :])
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        if any(isinstance(callback, LoRADACallback) for callback in self.callback_handler.callbacks):
            raise ConfigError("LoRADATrainer has a LoRADACallback of its own. Give its settings as da_config instead.")
        self._lora_da.compute_loss = self._loss_for_statistics
        self._lora_da.on_report = self._log_report
        self.add_callback(self._lora_da)

    @property
    def lora_da_report(self) -> LoRADAReport | None:
        """What the initialisation did; None before training."""
        return self._lora_da.report

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer as `Trainer` does (older versions take no model), of B alone if A is to be frozen.

        With a ``rank_budget`` the adapter is initialised before, since its layers get new parameters.

        Raises:
            UnsupportedSetupError: if there is a budget and an optimizer, or DeepSpeed or FSDP.
        """
        given: Any = kwargs.get("model", args[0] if args else None)
        model: Any = self.model if given is None else given
        if self._lora_da.spends_budget(model):
            self._spend_budget(model)
        if self._lora_da.config.freeze_a:
            freeze_a(model)
        return super().create_optimizer(*args, **kwargs)

    def _spend_budget(self, model: nn.Module) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UnsupportedSetupError(CANNOT_RESIZE.format("DeepSpeed or FSDP takes the adapter's parameters"))
        if self.optimizer is not None:
            raise UnsupportedSetupError(CANNOT_RESIZE.format("The optimizer that was given holds the parameters"))
        self._forward_context = lambda: self.accelerator.autocast()  # which `prepare` puts around the model later
        try:
            self._lora_da.initialize_early(self.args, self.state, model, self.get_train_dataloader())
        finally:
            self._forward_context = contextlib.nullcontext

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load as `Trainer` does, after the layers got the ranks that a budget gave them in the run that is resumed."""
        if self._lora_da.config.rank_budget is not None:
            model: Any = kwargs.get("model", args[0] if args else None) or self.model
            name = active_adapter_name(model)
            folder = Path(resume_from_checkpoint)
            adopt_ranks(model, name, (folder if name == "default" else folder / name) / ADAPTER_CONFIG_FILE)
            mark_initialized(model, name, may_be_zero=True)
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card as `Trainer` does, and cite the initialisation that training started from."""
        super().create_model_card(*args, **kwargs)
        report = self.lora_da_report
        if report is not None and report.init_from is not None and self.is_world_process_zero():
            cite_init(Path(self.args.output_dir or ".") / "README.md", report.init_from)

    def _loss_for_statistics(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        with self.compute_loss_context_manager(), self._forward_context():
            return self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

    def _log_report(self, report: LoRADAReport) -> None:
        self.log(report.metrics())


# Trainer's positional parameters after model and args
_MODEL_INIT_POSITION = list(inspect.signature(Trainer.__init__).parameters).index("model_init") - 3


def _bound_model_init(trainer_args: tuple[Any, ...], trainer_kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    if len(trainer_args) > _MODEL_INIT_POSITION:
        return trainer_args[_MODEL_INIT_POSITION]
    return trainer_kwargs.get("model_init")


def _wrap_model_init(model_init: Callable[..., Any], peft_config: LoraConfig | None) -> Callable[..., Any]:
    if isinstance(model_init, functools.partial):  # whose arguments Trainer counts in another way
        inner = _wrap_model_init(model_init.func, peft_config)
        return functools.partial(inner, *model_init.args, **model_init.keywords)

    @functools.wraps(model_init)  # keeps the signature, which Trainer looks at
    def wrapped(*args: Any, **kwargs: Any) -> nn.Module:
        return _with_adapter(model_init(*args, **kwargs), peft_config)

    wrapped.__signature__ = inspect.signature(model_init)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _with_adapter(model: object, peft_config: LoraConfig | None) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The model is a {type(model).__name__}. Load it first, with from_pretrained.")
    has_adapter = isinstance(model, PeftModel) or any(isinstance(m, LoraLayer) for m in model.modules())
    if has_adapter:
        refuse_unsaveable(model)
    if has_adapter and peft_config is not None:
        raise ConfigError("The model has an adapter already. Leave peft_config out, or give the plain model.")
    if has_adapter:
        return model
    if peft_config is None:
        raise TargetError(
            "The model has no LoRA adapter. Give LoRADATrainer a peft_config=LoraConfig(...), or a model that was "
            "wrapped with get_peft_model."
        )
    config = copy.deepcopy(peft_config)
    config.inference_mode = False  # which PEFT sets in a config that it stores
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
