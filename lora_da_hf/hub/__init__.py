"""Initialisations on the Hugging Face Hub: publishing, fetching and finding them."""

from lora_da_hf.hub.transfers import list_inits, pull_init, push_init

__all__ = ["list_inits", "pull_init", "push_init"]
