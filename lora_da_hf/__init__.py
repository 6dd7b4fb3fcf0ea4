"""LoRA adapters that start in the right place, computed from the data they will be trained on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_da_hf.artifacts.store import load_init as load_init
    from lora_da_hf.config import LoRADAConfig as LoRADAConfig
    from lora_da_hf.errors import LoRADAError as LoRADAError
    from lora_da_hf.pipeline import apply_init as apply_init
    from lora_da_hf.pipeline import export_init as export_init
    from lora_da_hf.pipeline import initialize_lora_da as initialize_lora_da
    from lora_da_hf.pipeline import refit_init as refit_init
    from lora_da_hf.report import LoRADAReport as LoRADAReport
    from lora_da_hf.training.callback import LoRADACallback as LoRADACallback
    from lora_da_hf.training.trainer import LoRADATrainer as LoRADATrainer

_HOMES = {
    "LoRADACallback": "lora_da_hf.training.callback",
    "LoRADAConfig": "lora_da_hf.config",
    "LoRADAError": "lora_da_hf.errors",
    "LoRADAReport": "lora_da_hf.report",
    "LoRADATrainer": "lora_da_hf.training.trainer",
    "apply_init": "lora_da_hf.pipeline",
    "export_init": "lora_da_hf.pipeline",
    "initialize_lora_da": "lora_da_hf.pipeline",
    "load_init": "lora_da_hf.artifacts.store",
    "refit_init": "lora_da_hf.pipeline",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `lora_da_hf.theory` needs torch alone, not transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
