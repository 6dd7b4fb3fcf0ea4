"""Initialisations on the Hugging Face Hub: publishing, fetching and finding them."""

from lora_da_hf.hub.pull import list_inits, pull_init
from lora_da_hf.hub.push import push_init

__all__ = ["list_inits", "pull_init", "push_init"]
