"""`lora-da`, the command line."""
