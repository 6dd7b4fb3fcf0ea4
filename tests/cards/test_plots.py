"""Plots from reports: what they show, and that no name breaks them."""

import sys

import pytest
from card_facts import make_report
from matplotlib.figure import Figure

from lora_da_hf.artifacts.folders import SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.hub.plots import directions_that_matter, draw_plots, draw_search, draw_spectra


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


def legend(figure):
    return [text.get_text() for text in (figure.legends or [figure.axes[0].get_legend()])[0].get_texts()]


def test_plots_are_png_files_drawn_without_pyplot():
    sys.modules.pop("matplotlib.pyplot", None)
    files = draw_plots(make_report())
    assert "matplotlib.pyplot" not in sys.modules
    assert set(files) == {SPECTRA_PLOT, SEARCH_PLOT}
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    assert set(draw_plots(make_report(search=[], search_loss_before=None))) == {SPECTRA_PLOT}


def test_spectra_have_a_line_for_each_module_type(figures):
    report = make_report()
    draw_spectra(report)
    left, right = figures[0].axes
    assert set(legend(figures[0])) == {"q_proj", "v_proj", "up_proj"}
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in (left, right))
    assert left.lines[2].get_ydata()[0] == 1.0
    assert [list(line.get_xdata()) for line in right.lines] == [[0, 1, 2]] * 3
    assert directions_that_matter(report.layers[2]) == pytest.approx((0.8 + 0.5 + 0.2) / 0.8)


def test_search_shows_every_step_the_base_and_the_choice(figures):
    draw_search(make_report())
    assert legend(figures[0]) == ["steps tried", "base model (2.7500)", "chosen: 0.3 (2.2500)", "no loss"]
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [0.1, 0.3]
    draw_search(make_report(search=[(0.1, None), (0.3, 9.0)], step_size=0.0, search_loss_after=2.75))
    assert "chosen" not in str(legend(figures[1]))
