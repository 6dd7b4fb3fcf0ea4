"""Finding initialisations on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo

from lora_da_hf.artifacts.folders import TAGS
from lora_da_hf.hub.client import hub_errors


@dataclass(frozen=True, kw_only=True)
class InitInfo:
    """What the Hub and the card's metadata say of an initialisation, such as its largest rank; nothing is checked."""

    repo_id: str
    commit: str | None
    private: bool
    base_model: str | None
    rank: int | None
    tags: tuple[str, ...]


def list_inits(
    *,
    base_model: str | None = None,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> list[InitInfo]:
    """List the initialisations on the Hub that the token may see: all, or those for a base, or of an author.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    tags = [*TAGS[-2:], *([f"base_model:adapter:{base_model}"] if base_model else [])]
    api = HfApi(endpoint=endpoint, token=token, library_name="lora_da_hf")
    with hub_errors("Listing initialisations"):
        found = api.list_models(filter=tags, author=author, limit=limit, full=True, cardData=True)
        return [_init_info(info) for info in found]


def _init_info(info: ModelInfo) -> InitInfo:
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    base, facts = card.get("base_model"), card.get("lora_da")
    rank = facts.get("max_rank") if isinstance(facts, dict) else None
    return InitInfo(
        repo_id=info.id,
        commit=info.sha,
        private=bool(info.private),
        base_model=base if isinstance(base, str) and base.isprintable() else None,
        rank=rank if type(rank) is int else None,
        tags=tuple(tag for tag in info.tags or () if tag.isprintable()),
    )
