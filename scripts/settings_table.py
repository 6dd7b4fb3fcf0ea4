"""Write docs/settings.md: every setting of LoRADAConfig with its default, and how to read the report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lora_da_hf import LoRADAConfig

BAR = "\\|"
PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """# Settings, and the report

`LoRADAConfig` has them all; on the command line (`lora-da init`, `lora-da plan`, `scripts/run_clm.py`) each is a flag,
`--da_` before its name. `LoRADAConfig.paper()` has the settings of the paper's authors where these differ (in
brackets); why they differ is in [decisions](decisions/0003-defaults.md). `python scripts/settings_table.py` writes
this page.

"""
REPORT = """
## The report

`trainer.lora_da_report`, `callback.report` and what `initialize_lora_da` returns print as a table, and are stored as
`lora_da_report.json`; `lora-da show FOLDER` prints that of a stored one. Up to 32 layers have a line each; of more,
those of a kind share one, with the range.

"""
EXPLAINED = {
    "samples": "how many the statistics were taken from, and of how many; how the loss of a batch comes from its "
    "samples, and how that is known",
    "step size": "spectral norm that the displacement of the layer that goes farthest was brought to. 0: no step "
    "lowered the loss, so B is zero",
    "loss": "before and after, on the samples of the search and on samples that nothing has seen. The second pair is "
    "the one to believe",
    "tokens": "rows that the layer's input second moment was taken from",
    "damping in": "what was added to the diagonal of the input second moment",
    "damping out": "the same for the output-gradient second moment",
    "displacement": "largest singular value of the damped natural gradient step, times its tokens",
    "lowest eigenvalue": "of the guidance matrix: the more negative, the more the first direction is worth",
    "solver": "how the eigenproblem was solved",
    "residual": "how exactly, relative to the largest eigenvalue",
    "|sBA|": "Frobenius norm of what the adapter adds to the weight at step 0",
    "kept": "layers that keep PEFT's own initialisation, and why",
}
"""Lines and columns of the report."""


def page() -> str:
    """Return the page."""
    paper = LoRADAConfig.paper()
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(LoRADAConfig):
        theirs = getattr(paper, field.name)
        default = written(field.default) + ("" if theirs == field.default else f" ({written(theirs)})")
        lines.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    rows = [f"| {name.replace('|', BAR)} | {text} |" for name, text in EXPLAINED.items()]
    report = "\n".join(["| line or column | what it says |", "|---|---|", *rows])
    return INTRODUCTION + "\n".join(lines) + "\n" + REPORT + report + "\n"


def written(value: Any) -> str:
    """Write a value as in Python, strings with the quotes of this project."""
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def main() -> None:
    """Write the page, or with --check compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page differs from the settings")
    check = parser.parse_args().check
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/settings.md differs from LoRADAConfig: run python scripts/settings_table.py")


if __name__ == "__main__":
    main()
