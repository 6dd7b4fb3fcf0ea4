"""Finding initialisations on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelInfo

from lora_da_hf.hub.client import hub_errors, make_api

INIT_TAGS = ("lora-da", "lora-init")


@dataclass(frozen=True, kw_only=True)
class InitInfo:
    """What the Hub and the card's metadata say of an initialisation; nothing of it has been checked.

    Attributes:
        repo_id: Owner and name.
        commit: The newest one.
        private: Whether the repo is private.
        base_model: As the card names it.
        rank: The largest rank that the card offers.
        tags: Of the repo.
    """

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
    """List the initialisations on the Hub that the token may see.

    Args:
        base_model: Only those for this base, by its name on the Hub.
        author: Only those of this user or organisation.
        limit: At most this many.
        token: None: the one of the environment or of `hf auth login`.
        endpoint: None: ``HF_ENDPOINT``, or huggingface.co.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    tags = [*INIT_TAGS, *([f"base_model:adapter:{base_model}"] if base_model else [])]
    api = make_api(token=token, endpoint=endpoint)
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
