"""The example card is what its run gives."""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from lora_da_hf.artifacts.folders import CARD_FILE, PLOTS
from lora_da_hf.hub.cards import render_page

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from render_example_card import EXAMPLE, read_example


def test_the_card_and_its_plots_are_rendered_from_the_run():
    init, facts = read_example()
    page = render_page(init, **facts)
    assert set(page) | {"run.json"} == {path.name for path in EXAMPLE.iterdir()}
    assert page[CARD_FILE].decode() == (EXAMPLE / CARD_FILE).read_text(encoding="utf-8")
    for name in PLOTS:  # versions of matplotlib differ by a little at the edges of letters
        drawn, stored = (imread(io.BytesIO(data)).astype(float) for data in (page[name], (EXAMPLE / name).read_bytes()))
        assert float(np.sqrt(((drawn - stored) ** 2).mean())) < 0.01
