"""`Trainer` with a LoRA adapter that starts from the data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from lora_da_hf.adapters.targets import active_adapter_name
from lora_da_hf.artifacts.adapter_config import INIT_LORA_WEIGHTS
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import LoRADAReport
from lora_da_hf.training.callback import LoRADACallback


class LoRADATrainer(Trainer):
    """A drop-in for `transformers.Trainer` that initialises the LoRA adapter from the training data.

    The initialisation uses the trainer's own data, collator, loss, precision and device, runs once before the first
    step, is logged, and is written to ``output_dir/lora_da``. Your callbacks' ``on_train_begin``
    comes first, so they still see the fresh adapter.

    Args:
        model: A plain model, with ``peft_config``, or a PEFT model with a fresh LoRA adapter.
        args, trainer_args, trainer_kwargs: As for `Trainer`.
        peft_config: How to wrap a plain model, or what ``model_init`` returns.
        da_config: The settings of the initialisation; None: ``LoRADAConfig()``.
        init_from, search_step: As for `LoRADACallback`.

    Raises:
        ConfigError: if ``peft_config`` does not fit the model or LoRA-DA, or the callbacks hold a `LoRADACallback`.
        TargetError: if the model has no LoRA layer, with ``peft_config`` if it is given.
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
        if peft_config is not None and any(trainer_kwargs.get("optimizers") or ()):
            raise ConfigError("The optimizer was made without the adapter. Give a model of get_peft_model's instead.")
        self._peft_config = peft_config
        self._lora_da = LoRADACallback(da_config, init_from=init_from, search_step=search_step)
        if model is not None:
            set_seed(args.seed if args is not None else TrainingArguments.seed)
            model = self._with_adapter(model)
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self._lora_da.attach(self)

    @property
    def lora_da_report(self) -> LoRADAReport | None:
        """What the initialisation did; None before training."""
        return self._lora_da.report

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Make a model as `Trainer` does, with an adapter."""
        return self._with_adapter(super().call_model_init(*args, **kwargs))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as `Trainer` does, after freezing A, which PEFT's load of a checkpoint may have thawed."""
        self._lora_da.freeze(self.model)
        return super().create_optimizer(*args, **kwargs)

    def _with_adapter(self, model: Any) -> nn.Module:
        if self._peft_config is not None:
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                raise ConfigError("The model has an adapter already. Leave peft_config out, or give the plain model.")
            config = copy.deepcopy(self._peft_config)
            config.inference_mode = False  # which PEFT sets in a config that it stores
            start = getattr(config, "init_lora_weights", True)
            if start not in INIT_LORA_WEIGHTS:
                raise ConfigError(
                    f"peft_config has init_lora_weights={start!r}, which changes the base's weights or makes B other "
                    "than zero. LoRA-DA starts from a fresh adapter on the base as it is: leave it out."
                )
            model = get_peft_model(model, config)
        active_adapter_name(model)  # refuses a model without LoRA
        return model
