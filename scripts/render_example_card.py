"""Render hub_cards/example anew from the manifest, the report and the facts that lie there.

python scripts/render_example_card.py
"""

import json
from pathlib import Path

from lora_da_hf.artifacts.card_files import CARD_FILE
from lora_da_hf.artifacts.schema import CHECKSUM, MANIFEST_FILE, FileEntry, LayerEntry, Manifest
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.hub.cards import card_plots, render_card

EXAMPLE = Path(__file__).resolve().parents[1] / "hub_cards" / "example"


def read_example(folder: Path = EXAMPLE) -> tuple[StoredInit, dict]:
    """Read the initialisation without its tensors, and what is said about it besides."""
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    del values[CHECKSUM]
    values["layers"] = {name: LayerEntry(**entry) for name, entry in values["layers"].items()}
    values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return StoredInit(folder=folder, manifest=Manifest(**values), bases={}), facts


def main() -> None:
    """Write the card and its plots."""
    init, facts = read_example()
    plots = card_plots(init)
    card = render_card(init, plots=plots, **facts)
    for name, content in {CARD_FILE: card.encode("utf-8"), **plots}.items():
        (EXAMPLE / name).write_bytes(content)
        print(EXAMPLE / name)


if __name__ == "__main__":
    main()
