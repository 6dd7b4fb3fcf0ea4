"""An initialisation from beginning to end: the one place where the parts meet."""

from lora_da_hf.pipeline.run import initialize_lora_da

__all__ = ["initialize_lora_da"]
