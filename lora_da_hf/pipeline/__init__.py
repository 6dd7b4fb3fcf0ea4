"""An initialisation from beginning to end: the one place where the parts meet."""

from lora_da_hf.pipeline.apply import apply_init
from lora_da_hf.pipeline.export import export_init
from lora_da_hf.pipeline.refit import refit_init
from lora_da_hf.pipeline.run import initialize_lora_da

__all__ = ["apply_init", "export_init", "initialize_lora_da", "refit_init"]
