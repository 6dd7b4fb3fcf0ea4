"""The initialisation inside Hugging Face training: a trainer, a callback, command-line arguments."""
