"""The plot of a report: what it shows."""

import sys

import pytest
from card_facts import make_report
from matplotlib.figure import Figure

from lora_da_hf.hub.plots import directions_that_matter, draw_spectra


@pytest.fixture
def figures(monkeypatch):
    """Keep the figures that are drawn."""
    drawn = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_the_plot_is_a_png_file_drawn_without_pyplot():
    sys.modules.pop("matplotlib.pyplot", None)
    assert draw_spectra(make_report()).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_spectra_have_a_line_for_each_module_type(figures):
    report = make_report()
    draw_spectra(report)
    left, right = figures[0].axes
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"q_proj", "v_proj", "up_proj"}
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in (left, right))
    assert left.lines[2].get_ydata()[0] == 1.0
    assert [list(line.get_xdata()) for line in right.lines] == [[0, 1, 2]] * 3
    assert directions_that_matter(report.layers[2]) == pytest.approx((0.8 + 0.5 + 0.2) / 0.8)
