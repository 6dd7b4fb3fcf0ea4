"""Render hub_cards/example anew from the manifest and the facts that lie there.

python scripts/render_example_card.py
"""

import json
from pathlib import Path

from lora_da_hf.artifacts.adapter_config import check_adapter_config
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE
from lora_da_hf.artifacts.store import StoredInit, load_manifest
from lora_da_hf.hub.page import render_page

EXAMPLE = Path(__file__).resolve().parents[1] / "hub_cards" / "example"


def read_example(folder: Path = EXAMPLE) -> tuple[StoredInit, dict]:
    """Read the initialisation without its tensors, and what is said about it besides."""
    manifest = load_manifest(folder)
    peft_config = check_adapter_config(folder / ADAPTER_CONFIG_FILE, manifest)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    init = StoredInit(folder=folder, manifest=manifest, bases={}, peft_config=peft_config, source=manifest.digest)
    return init, facts


def main() -> None:
    """Write the card and its plots."""
    init, facts = read_example()
    for name, content in render_page(init, **facts).items():
        (EXAMPLE / name).write_bytes(content)
        print(EXAMPLE / name)


if __name__ == "__main__":
    main()
