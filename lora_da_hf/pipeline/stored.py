"""What a stored initialisation says about settings and steps, for ranks and settings that may be others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.config import FREE_IN_REFIT, FREE_IN_USE, PASS_SETTINGS, LoRADAConfig
from lora_da_hf.errors import ConfigError

Given = LoRADAConfig | Mapping[str, Any] | None
"""Settings that replace stored ones: by name, or a whole config."""


def changed_settings(config: LoRADAConfig, other: LoRADAConfig) -> list[str]:
    """Return the names of the settings that differ."""
    return [name for name, value in vars(config).items() if value != getattr(other, name)]


def gives_step(given: Given) -> bool:
    """Tell whether settings say how far step 0 goes, so that nothing is searched."""
    if isinstance(given, LoRADAConfig):
        return not given.searches_step
    return given is not None and given.get("step_size", "line_search") != "line_search"


def config_for_use(manifest: Manifest, given: Given) -> LoRADAConfig:
    """Return the stored settings, with those that are given in their place: of a config, what is not the default's.

    ``freeze_a`` concerns training, so it is always that of ``given``.
    """
    stored = dataclasses.replace(manifest.config, freeze_a=False)
    new, names = _allowed(stored, given, FREE_IN_USE, "use refit_init first, or compute an initialisation anew")
    return dataclasses.replace(stored, **{name: getattr(new, name) for name in names})


def config_for_refit(manifest: Manifest, given: Given) -> LoRADAConfig:
    """Return the stored settings, with those of the solve and of the write that are given in their place.

    What cannot be had offline stays as stored: a step that is to be searched, and a rank of None.
    """
    stored = dataclasses.replace(manifest.config, save_statistics=False)
    new, _ = _allowed(stored, given, FREE_IN_REFIT, "compute an initialisation anew")
    values = {name: getattr(new, name) for name in FREE_IN_REFIT}
    step = stored.step_size if new.searches_step else new.step_size
    return dataclasses.replace(stored, **{**values, "step_size": step, "max_rank": new.max_rank or stored.max_rank})


def _allowed(
    stored: LoRADAConfig, given: Given, free: Collection[str], remedy: str
) -> tuple[LoRADAConfig, Collection[str]]:
    """Return what is given as a whole config, and the names of what counts of it."""
    if isinstance(given, LoRADAConfig):
        names, new = changed_settings(given, LoRADAConfig()), given
    else:
        names, new = list(given or ()), LoRADAConfig(**{**stored.to_dict(), **(given or {})})
    names = [name for name in names if name not in PASS_SETTINGS]
    fixed = [name for name in names if name not in free and getattr(new, name) != getattr(stored, name)]
    if fixed:
        asked, was = (", ".join(f"{n}={getattr(config, n)!r}" for n in fixed) for config in (new, stored))
        raise ConfigError(
            f"{asked}: the stored initialisation was computed with {was}, and keeps that here. Leave it out, or "
            f"{remedy}."
        )
    return new, names


def stored_step(
    manifest: Manifest, ranks: Mapping[str, int], changed: Collection[str] = ()
) -> tuple[float | None, str]:
    """Choose the step for layers of any ranks from those that are stored, and say where it is from.

    It is the stored one where all ranks are as stored, or where it was not searched. Otherwise it is interpolated in
    the ladder of searched steps, at the geometric mean of the ranks and in logarithms of both; beyond the ends the
    nearest rung counts, and beside a rung where no step helped it is 0. None: it follows from `stable_gamma`.
    """
    step, steps = manifest.report.step_size, dict(sorted(manifest.report.step_size_by_rank.items()))
    if step is None:
        return None, "the step follows from stable_gamma and each layer's scaling"
    if not steps:
        return step, f"step {step:.4g}, as {'stored' if manifest.refitted_from else 'given'}"
    changed = list(dict.fromkeys((*(manifest.refitted_from.changed if manifest.refitted_from else ()), *changed)))
    since = f"; it was searched before {', '.join(changed)} changed" if changed else ""
    if len(ranks) < len(manifest.layers):
        since += f"; it was searched with {len(manifest.layers) - len(ranks)} more layers"
    if all(manifest.layers[name].rank == rank for name, rank in ranks.items()):
        where = "stored" if manifest.refitted_from else "searched"
        as_plain = "" if step else ", so B stays zero, as in plain LoRA"
        return step, f"step {step:.4g}, as {where} for these ranks{since}{as_plain}"
    rank = math.exp(sum(map(math.log, ranks.values())) / len(ranks))
    low = max((r for r in steps if r <= rank * (1 + 1e-9)), default=min(steps))
    high = min((r for r in steps if r >= rank * (1 - 1e-9)), default=max(steps))
    if not steps[low] or not steps[high]:
        return 0.0, f"step 0: for rank {low} or rank {high} no step helped{since}, so B stays zero, as in plain LoRA"
    share = math.log(rank / low) / math.log(high / low) if high != low else 0.0
    between = steps[low] ** (1 - share) * steps[high] ** share
    rungs = f"searched for rank {low}" if high == low else f"interpolated between those of ranks {low} and {high}"
    return between, f"step {between:.4g} for rank {rank:.3g}, {rungs}{since}"
