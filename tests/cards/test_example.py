"""The example card is what its run gives."""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from lora_da_hf.artifacts.folders import CARD_FILE, PLOT_FILE
from lora_da_hf.hub.cards import render_page

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from render_example_card import EXAMPLE, read_example


def test_the_card_and_its_plot_are_rendered_from_the_run():
    init, facts = read_example()
    page = render_page(init, **facts)
    assert set(page) | {"run.json"} == {path.name for path in EXAMPLE.iterdir()}
    assert page[CARD_FILE].decode() == (EXAMPLE / CARD_FILE).read_text(encoding="utf-8")
    plots = (page[PLOT_FILE], (EXAMPLE / PLOT_FILE).read_bytes())
    drawn, stored = (imread(io.BytesIO(data)).astype(float) for data in plots)
    assert float(np.sqrt(((drawn - stored) ** 2).mean())) < 0.01  # versions of matplotlib draw edges of letters apart
