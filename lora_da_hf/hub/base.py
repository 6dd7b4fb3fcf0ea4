"""What the Hub says of a base model, as far as a card and a push need it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.hub.cards import is_license, is_license_link
from lora_da_hf.hub.facts import base_id_of

_STACK_LEVEL = 4
"""Of warnings by `base_facts`: whoever called `push_init`."""


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What the Hub says of a base model.

    Attributes:
        name: Its name there; None: it is a folder, or has none.
        license: Its licence, if it names a well-formed one.
        license_name: The name of a licence called other.
        license_link: Where the text of a licence called other is.
    """

    name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def license_facts(self, given: Mapping[str, str | None]) -> dict[str, str | None]:
        """Return what a card says of the licence: what is given, and of the same licence what the base says besides.

        Args:
            given: ``license``, ``license_name`` and ``license_link``; None: not given.
        """
        chosen = given["license"] or self.license
        own = chosen == "other" == self.license
        return {
            "license": chosen,
            "license_name": given["license_name"] or (self.license_name if own else None),
            "license_link": given["license_link"] or (self.license_link if own else None),
        }


def base_facts(api: HfApi, init: StoredInit, base_model: str | None, *, with_license: bool) -> BaseFacts:
    """Ask the Hub for licence and gate of the base of an initialisation; a local folder it is not asked for.

    Args:
        api: The client.
        init: The initialisation.
        base_model: Name of the base on the Hub, if it was computed from a local copy.
        with_license: Whether the licence is asked for; a card of the user's own says it itself.
    """
    name = base_id_of(init.manifest, base_model)
    stored = init.manifest.base_model.name_or_path
    if stored and base_id_of(init.manifest) is None:
        advice = (
            "Give its name there as base_model (--base_model)." if name is None else "Only a card can say its name."
        )
        _warn(
            f"The base model is called {stored!r}, which is no name on the Hub: manifest and adapter config are "
            f"published with it as it is, and nobody can find the base by it. {advice}"
        )
    if name is None:
        return BaseFacts()
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        return BaseFacts(name=name)
    if info.gated:
        _warn(f"The base model {name!r} is gated: see whether its conditions let you share what was computed from it.")
    if not with_license:
        return BaseFacts(name=name)
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    link = _well_formed(name, "license_link", card.get("license_link"), is_license_link)
    return BaseFacts(
        name=name,
        license=_well_formed(name, "license", card.get("license"), is_license),
        license_name=_well_formed(name, "license_name", card.get("license_name"), bool),
        license_link=link if link is None else _from_elsewhere(name, link),
    )


def _from_elsewhere(base: str, link: str) -> str:
    """Return the address of what a base's card links to, which may be a file beside that card."""
    return link if link.startswith("https://") else f"https://huggingface.co/{base}/blob/main/{link}"


def _well_formed(base: str, what: str, value: Any, is_well_formed: Any) -> str | None:
    """Return what a base's card says, or None if that is malformed, which is warned about."""
    if value is None or (isinstance(value, str) and is_well_formed(value)):
        return value
    _warn(
        f"The card of the base model {base!r} says {what}={str(value)[:80]!r}, which is malformed and left out. "
        f"Look it up and give it as {what} (--{what}).",
        stack_level=_STACK_LEVEL + 1,
    )
    return None


def _warn(text: str, *, stack_level: int = _STACK_LEVEL) -> None:
    warnings.warn(text, stacklevel=stack_level)
