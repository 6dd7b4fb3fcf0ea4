"""LoRA adapters that start in the right place, computed from the data they will be trained on."""

from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import LoRADAError
from lora_da_hf.pipeline import initialize_lora_da
from lora_da_hf.report import LoRADAReport
from lora_da_hf.training.callback import LoRADACallback
from lora_da_hf.training.trainer import LoRADATrainer

__all__ = [
    "LoRADACallback",
    "LoRADAConfig",
    "LoRADAError",
    "LoRADAReport",
    "LoRADATrainer",
    "initialize_lora_da",
]
