"""LoRA adapters that start in the right place, computed from the data they will be trained on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_da_hf.artifacts.store import load_init
    from lora_da_hf.config import LoRADAConfig
    from lora_da_hf.errors import LoRADAError
    from lora_da_hf.pipeline import apply_init, export_init, initialize_lora_da, refit_init
    from lora_da_hf.report import LoRADAReport
    from lora_da_hf.training.callback import LoRADACallback
    from lora_da_hf.training.trainer import LoRADATrainer

__all__ = ["LoRADACallback", "LoRADAConfig", "LoRADAError", "LoRADAReport", "LoRADATrainer"]
__all__ += ["apply_init", "export_init", "initialize_lora_da", "load_init", "refit_init"]

_HOMES = {
    **dict.fromkeys(__all__, "pipeline"),
    "LoRADACallback": "training.callback",
    "LoRADAConfig": "config",
    "LoRADAError": "errors",
    "LoRADAReport": "report",
    "LoRADATrainer": "training.trainer",
    "load_init": "artifacts.store",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `lora_da_hf.theory` does without transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
