"""The example card is what its run's manifest and report give."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lora_da_hf.artifacts.card_files import CARD_FILE, PLOTS, SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.artifacts.manifest import MANIFEST_FILE
from lora_da_hf.artifacts.store import file_entry
from lora_da_hf.hub.cards import render_card
from lora_da_hf.hub.plots import draw_plots

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from render_example_card import EXAMPLE, read_example


def test_the_card_is_rendered_from_what_lies_beside_it():
    init, facts = read_example()
    expected = render_card(init, plots=[SPECTRA_PLOT, SEARCH_PLOT], **facts)
    assert (EXAMPLE / CARD_FILE).read_text(encoding="utf-8") == expected


def test_the_card_shows_the_plots_that_lie_beside_it():
    shown = re.findall(r"!\[[^]]+\]\((.+)\)", (EXAMPLE / CARD_FILE).read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in EXAMPLE.glob("*.png")) == sorted(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_the_plots_are_drawn_from_the_report_beside_them(name):
    """Versions of matplotlib may differ by a little at the edges of letters, and another curve by much more."""
    init, _ = read_example()
    report = init.report
    assert difference(draw_plots(report)[name], (EXAMPLE / name).read_bytes()) < 0.01
    other = dataclasses.replace(
        report,
        layers=[dataclasses.replace(layer, eigenvalues=layer.eigenvalues[::2]) for layer in report.layers],
        search=report.search[1:],
    )
    assert difference(draw_plots(other)[name], (EXAMPLE / name).read_bytes()) > 0.02


def difference(first, second):
    """Return the root mean square of the difference of two pictures, as a part of the span from black to white."""
    first, second = (imread(io.BytesIO(picture)).astype(float) for picture in (first, second))
    return float(np.sqrt(((first - second) ** 2).mean())) if first.shape == second.shape else 1.0


def test_report_and_configuration_are_those_of_the_run():
    entries = json.loads((EXAMPLE / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    for name in ("lora_da_report.json", "adapter_config.json"):
        entry = file_entry(EXAMPLE / name)
        assert {"size": entry.size, "sha256": entry.sha256} == entries[name]


def test_it_holds_no_tensors_and_is_small():
    assert {path.suffix for path in EXAMPLE.iterdir()} == {".md", ".png", ".json"}
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 1_000_000
