"""What is shown of an initialisation on its page: the card, and the plots beside it."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCard

from lora_da_hf.artifacts.card_files import CARD_FILE, PLOTS
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.errors import CardError
from lora_da_hf.hub.cards import card_plots, render_card


def render_page(init: StoredInit, **facts: Any) -> dict[str, bytes]:
    """Render the card and draw its plots.

    Args:
        init: The initialisation.
        facts: As for `render_card`.

    Returns:
        Files by name.
    """
    plots = card_plots(init)
    return {CARD_FILE: render_card(init, plots=plots, **facts).encode("utf-8"), **plots}


def own_page(init: StoredInit, card: str) -> dict[str, bytes]:
    """Draw the plots that a card of one's own shows.

    Returns:
        Files by name, the card among them.

    Raises:
        CardError: if it shows a plot that cannot be drawn.
    """
    shown = sorted(name for name in PLOTS if name in card)
    plots = card_plots(init) if shown else {}
    missing = [name for name in shown if name not in plots]
    if missing:
        raise CardError(
            f"The card shows {missing[0]}, which cannot be drawn for this initialisation. Take the picture out of the "
            "card, or install matplotlib: pip install matplotlib."
        )
    return {CARD_FILE: card.encode("utf-8"), **{name: plots[name] for name in shown}}


def license_of(card: str) -> str | None:
    """Return the licence that a card's metadata names.

    Raises:
        CardError: if there is metadata that cannot be read.
    """
    try:
        found = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CardError(f"The card's metadata cannot be read: {error}. Correct it, or leave the card out.") from error
    return found if isinstance(found, str) else None
