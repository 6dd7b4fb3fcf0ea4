"""`lora-da refit`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lora_da_hf.cli.flags import Flags, base_model_of_folder, dataclass_flags, joined, new_folder, positive
from lora_da_hf.cli.output import Output
from lora_da_hf.errors import ConfigError
from lora_da_hf.setting_groups import FREE_IN_REFIT, PASS_SETTINGS
from lora_da_hf.training.arguments import PREFIX, LoRADAArguments, setting_of_flag


def refit_parser() -> argparse.ArgumentParser:
    """Return the flags of `lora-da refit`. Settings that are not given stay as they were."""
    own = Flags()
    own.folder()
    own.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the new initialisation")
    own.flag(
        "overwrite",
        action="store_true",
        help="replace an initialisation that is there; FOLDER itself may be OUTPUT, and keeps its statistics",
    )
    own.flag("rank", type=positive, help="rank of the new adapter, at most the stored one")
    own.flag("rank_budget", type=positive, help="parameters of the adapter, shared out between the layers")
    own.flag("step_size", type=float, help="how far step 0 goes (default: as the stored steps say)")
    own.loaded_base_model("and compare it (a DoRA adapter needs it)")
    settings = dataclass_flags(LoRADAArguments)
    shown = FREE_IN_REFIT - {action.dest for action in own._actions}
    for action in settings._actions:
        action.default = argparse.SUPPRESS
        if action.dest.removeprefix(PREFIX) not in shown:
            action.help = argparse.SUPPRESS  # one that refit cannot change, or that has a flag above
        elif action.help is not None:
            action.help = re.sub(r" \(default: .*\)$| None: .*$", "", action.help) + " (default: as stored)"
    return joined(own, settings)


def run_refit(arguments: argparse.Namespace, output: Output) -> None:
    """Make another initialisation from a stored one."""
    from lora_da_hf.pipeline.refit import refit_init

    folder = new_folder(arguments.output, overwrite=arguments.overwrite)
    refit_init(
        arguments.folder,
        folder,
        config=_given_settings(arguments),
        rank=arguments.rank,
        rank_budget=arguments.rank_budget,
        step_size=arguments.step_size,
        base_model=base_model_of_folder(arguments, output),
        progress=output.shows_progress,
    )
    output.result({"folder": str(folder)}, bare=str(folder), text=f"Written to {folder}")


def _given_settings(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the settings on the command line; None if there are none.

    Raises:
        ConfigError: if one would change nothing, or is given by a flag of its own too.
    """
    given = {
        flag.removeprefix(PREFIX): setting_of_flag(flag, value)
        for flag, value in vars(arguments).items()
        if flag.startswith(PREFIX)
    }
    idle = [name for name in PASS_SETTINGS if name in given]
    if idle:
        raise ConfigError(f"--{PREFIX}{idle[0]} is for a pass over data, and refit makes none. Leave it out.")
    twice = [name for name in ("step_size", "rank_budget") if name in given and getattr(arguments, name) is not None]
    if twice:
        raise ConfigError(f"--{twice[0]} and --{PREFIX}{twice[0]} say the same thing. Give one of them.")
    return given or None
