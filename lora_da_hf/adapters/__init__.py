"""PEFT's LoRA layers: which can be initialised, how they are tried out, how they are written."""
