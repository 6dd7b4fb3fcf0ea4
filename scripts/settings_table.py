"""Write docs/settings.md: every setting of LoRADAConfig with its default, and how to read the report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lora_da_hf import LoRADAConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """# Settings, and the report

All fields of `LoRADAConfig`. On the command line each is a flag with `--da_` before its name. In brackets:
`LoRADAConfig.paper()`, the settings of the paper's authors, where they differ ([why](decisions/0003-defaults.md)).
`python scripts/settings_table.py` writes this page.

Few trainings need more than the first five. A layer's *displacement* is its damped natural gradient step. *Scaling* is
PEFT's: alpha / r, or with rsLoRA alpha / √r.

"""
FIRST = ("num_samples", "batch_size", "step_size", "max_rank", "memory_budget")
REPORT = """
## The report

Print `trainer.lora_da_report`, `callback.report` or what `initialize_lora_da` returns. `lora-da show FOLDER` prints the
report of a stored initialisation. With more than 32 layers, those of a kind share a line, with the range.

"""
EXPLAINED = {
    "samples": "how many the statistics were taken from, and how the loss of a batch is made of its samples",
    "step size": "spectral norm that the farthest layer's displacement is brought to. `by layer`: set from "
    "`stable_gamma`. 0: no step helped, or the start has none; B is zero",
    "loss": "before and after, on the samples of the search and on held-out samples. Believe the second pair",
    "tokens": "rows in the layer's input second moment",
    "displacement": "largest singular value of the layer's displacement before it is divided by its tokens",
    "lowest eigenvalue": "of the guidance matrix; for another start, of minus what it leads by. The more negative, the "
    "more the first direction is worth",
    "residual": "how exactly the eigenproblem was solved, relative to the largest eigenvalue",
    "|sBA|": "Frobenius norm of what the adapter adds to the weight at step 0",
    "kept": "layers that keep PEFT's own initialisation, and why",
}


def page() -> str:
    """Return the page."""
    paper = LoRADAConfig.paper()
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for field in sorted(dataclasses.fields(LoRADAConfig), key=lambda field: field.name not in FIRST):
        theirs = getattr(paper, field.name)
        default = written(field.default) + ("" if theirs == field.default else f" ({written(theirs)})")
        lines.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    rows = ["| " + name.replace("|", "\\|") + f" | {text} |" for name, text in EXPLAINED.items()]
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
