"""Plots from reports: what they show, and that no name breaks them."""

import builtins
import io
import sys

import pytest
from card_facts import LAYERS, make_report
from matplotlib.image import imread

from lora_da_hf.artifacts.card_files import SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.errors import MissingDependencyError
from lora_da_hf.hub import plots
from lora_da_hf.hub.plots import (
    directions_that_matter,
    draw_plots,
    draw_search,
    draw_spectra,
    relative_gains,
)


@pytest.fixture
def figures(monkeypatch):
    """Keep the figures that are drawn."""
    drawn = []
    png = plots._png

    def keep(figure):
        drawn.append(figure)
        return png(figure)

    monkeypatch.setattr(plots, "_png", keep)
    return drawn


def test_plots_are_png_files_of_a_readable_size():
    files = draw_plots(make_report())
    assert set(files) == {SPECTRA_PLOT, SEARCH_PLOT}
    for content in files.values():
        height, width, _ = imread(io.BytesIO(content)).shape
        assert height > 400
        assert width > 600


def test_gains_are_relative_to_the_first_direction():
    layer = make_report().layers[2]
    assert relative_gains(layer) == pytest.approx([1.0, 0.625, 0.25, -0.025, -0.125])
    assert directions_that_matter(layer) == pytest.approx((0.8 + 0.5 + 0.2) / 0.8)


def test_spectra_have_a_line_for_each_module_type_and_axes_with_names(figures):
    draw_spectra(make_report())
    left, right = figures[0].axes
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"q_proj", "v_proj", "up_proj"}
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in (left, right))
    assert [list(line.get_xdata()) for line in right.lines] == [[0, 1, 2]] * 3


def test_search_shows_every_step_the_base_and_the_choice(figures):
    draw_search(make_report())
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["steps tried", "base model (2.7500)", "chosen: 0.3 (2.2500)", "no loss"]
    assert list(axes.lines[0].get_xdata()) == [0.1, 0.3]
    assert axes.get_xscale() == "log"


def test_many_module_types_share_one_legend_entry(figures):
    draw_spectra(make_report([f"layers.0.kind{number}" for number in range(30)]))
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert len(labels) == 10
    assert labels[-1] == "all others"


@pytest.mark.parametrize("name", ["$x^{", "_hidden", "层", "🙂", "a\nb", "", "\ud800", "\\frac{"])
def test_no_name_breaks_a_plot(name, figures):
    draw_spectra(make_report([f"layers.{99999999999}.{name}"]))
    assert len(figures[0].legends[0].get_texts()) == 1


def test_a_report_without_a_search_has_one_plot():
    assert set(draw_plots(make_report(search=[], search_loss_before=None))) == {SPECTRA_PLOT}


def test_a_search_in_which_nothing_helped_is_drawn(figures):
    draw_search(make_report(search=[(0.1, None), (0.3, 9.0)], step_size=0.0, search_loss_after=2.75))
    assert "chosen" not in str([text.get_text() for text in figures[0].axes[0].get_legend().get_texts()])


def test_pyplot_is_not_touched():
    sys.modules.pop("matplotlib.pyplot", None)
    draw_plots(make_report(LAYERS[:2]))
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"pip install matplotlib"):
        draw_plots(make_report())
