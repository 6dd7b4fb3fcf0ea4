"""The files of an initialisation's page, which may lie in its folder: the card and its plots."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

CARD_FILE = "README.md"
TAGS = ("lora", "peft", "lora-da", "lora-init")
SPECTRA_PLOT = "guidance_spectra.png"
SEARCH_PLOT = "step_search.png"
PLOTS = (SPECTRA_PLOT, SEARCH_PLOT)


def is_own_card(text: bytes) -> bool:
    """Tell whether a file is a card of an initialisation, by the tags in its metadata."""
    block = REGEX_YAML_BLOCK.search(text.decode("utf-8", errors="replace"))
    try:
        metadata: Any = yaml.safe_load(block.group(2)) if block is not None else None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):  # such as a date that does not exist
        return False
    tags: Any = metadata.get("tags") if isinstance(metadata, dict) else None  # pyright: ignore[reportUnknownMemberType]
    return isinstance(tags, list) and set(TAGS) <= set(map(str, tags))  # pyright: ignore[reportUnknownArgumentType]
