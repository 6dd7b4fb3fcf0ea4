"""Settings of `LoRADAConfig` by what they decide, which tells which of them may change later."""

SOLVE_SETTINGS = (
    "input_damping",
    "output_damping",
    "variance_weight",
    "normalize_guidance_terms",
    "layer_steps",
    "max_rank",
)
"""Full statistics allow to change these."""

_WRITE_SETTINGS = ("step_size", "stable_gamma", "factor_split", "freeze_a")
"""The basis alone allows to change these."""

PASS_SETTINGS = ("memory_budget",)
"""How a machine makes a pass over data, which changes nothing that it finds."""

FREE_IN_REFIT = frozenset({*SOLVE_SETTINGS, *_WRITE_SETTINGS, "save_statistics"})
"""What `refit_init` may change."""

FREE_IN_USE = frozenset({*_WRITE_SETTINGS, "search_samples", "batch_size", "loss_reduction"})
"""What `apply_init` may change: the write, and the search of a step, which needs data and no statistics."""
