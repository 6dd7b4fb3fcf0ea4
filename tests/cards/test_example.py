"""The example card is what its run's manifest and report give."""

import json
import sys
from pathlib import Path

from lora_da_hf.artifacts.schema import MANIFEST_FILE
from lora_da_hf.artifacts.store import file_entry
from lora_da_hf.hub.cards import CARD_FILE, render_card
from lora_da_hf.hub.plots import SEARCH_PLOT, SPECTRA_PLOT

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from render_example_card import EXAMPLE, read_example


def test_the_card_is_rendered_from_what_lies_beside_it():
    init, facts = read_example()
    expected = render_card(init, plots=[SPECTRA_PLOT, SEARCH_PLOT], **facts)
    assert (EXAMPLE / CARD_FILE).read_text(encoding="utf-8") == expected


def test_report_and_configuration_are_those_of_the_run():
    entries = json.loads((EXAMPLE / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    for name in ("lora_da_report.json", "adapter_config.json"):
        entry = file_entry(EXAMPLE / name)
        assert {"size": entry.size, "sha256": entry.sha256} == entries[name]


def test_it_holds_no_tensors_and_is_small():
    assert {path.suffix for path in EXAMPLE.iterdir()} == {".md", ".png", ".json"}
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 1_000_000
