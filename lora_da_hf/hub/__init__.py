"""Initialisations on the Hugging Face Hub, and their cards."""
