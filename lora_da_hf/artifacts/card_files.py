"""The files of an initialisation's page, which may lie in its folder: the card and its plots."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard

CARD_FILE = "README.md"
TAGS = ("lora", "peft", "lora-da", "lora-init")
SPECTRA_PLOT = "guidance_spectra.png"
SEARCH_PLOT = "step_search.png"
PLOTS = (SPECTRA_PLOT, SEARCH_PLOT)


def is_own_card(text: bytes) -> bool:
    """Tell whether a file is a card of an initialisation, by the tags in its metadata."""
    try:
        tags = ModelCard(text.decode("utf-8"), ignore_metadata_errors=True).data.to_dict().get("tags")
    except (yaml.YAMLError, ValueError, TypeError):
        return False
    return isinstance(tags, list) and set(TAGS) <= set(map(str, tags))  # pyright: ignore[reportUnknownArgumentType]
