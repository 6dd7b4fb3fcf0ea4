"""Render hub_cards/example anew from the manifest, the report and the facts that lie there.

python scripts/render_example_card.py
"""

import json
from pathlib import Path

from lora_da_hf.artifacts.schema import CHECKSUM, MANIFEST_FILE, REPORT_FILE, FileEntry, LayerEntry, Manifest
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.stored_report import read_report
from lora_da_hf.hub.page import render_page

EXAMPLE = Path(__file__).resolve().parents[1] / "hub_cards" / "example"


def read_example(folder: Path = EXAMPLE) -> tuple[StoredInit, dict]:
    """Read the initialisation without its tensors, and what is said about it besides."""
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    del values[CHECKSUM]
    values["layers"] = {name: LayerEntry(**entry) for name, entry in values["layers"].items()}
    values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    manifest = Manifest(**values)
    report = read_report(folder / REPORT_FILE, manifest)
    return StoredInit(folder=folder, manifest=manifest, bases={}, report=report), facts


def main() -> None:
    """Write the card and its plots."""
    init, facts = read_example()
    for name, content in render_page(init, **facts).items():
        (EXAMPLE / name).write_bytes(content)
        print(EXAMPLE / name)


if __name__ == "__main__":
    main()
