"""The mathematics of LoRA-DA as pure functions of tensors: no modules, no files, no processes."""
