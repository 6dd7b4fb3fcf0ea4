"""The plot of a report: what it shows."""

import sys

from card_facts import make_report

from lora_da_hf.hub.cards import draw_spectra


def test_the_plot_is_a_png_file_drawn_without_pyplot():
    sys.modules.pop("matplotlib.pyplot", None)
    assert draw_spectra(make_report()).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
