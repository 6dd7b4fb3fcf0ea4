"""Render hub_cards/example anew from the run that is stored in its run.json.

python scripts/render_example_card.py
"""

import json
from pathlib import Path

from lora_da_hf.artifacts.manifest import Manifest
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.hub.cards import render_page

EXAMPLE = Path(__file__).resolve().parents[1] / "hub_cards" / "example"


def read_example() -> tuple[StoredInit, dict]:
    """Return the initialisation without its tensors, and what is said about it besides."""
    run = json.loads((EXAMPLE / "run.json").read_text(encoding="utf-8"))
    manifest = Manifest.model_validate_json(json.dumps(run["manifest"]))
    init = StoredInit(
        folder=EXAMPLE, manifest=manifest, bases={}, peft_config=run["adapter_config"], source=manifest.digest
    )
    return init, run["facts"]


def main() -> None:
    """Write the card and its plot."""
    init, facts = read_example()
    for name, content in render_page(init, **facts).items():
        (EXAMPLE / name).write_bytes(content)
        print(EXAMPLE / name)


if __name__ == "__main__":
    main()
