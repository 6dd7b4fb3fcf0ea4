"""What `init_from` names, and how a model's cards cite it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.errors import ConfigError, HubError
from lora_da_hf.losses import base_model_of

logger = logging.getLogger(__name__)

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[^@\s]+)?")


def find_init(init_from: str | Path) -> Path | StoredInit:
    """Return the folder that ``init_from`` names or, if there is none, what the Hub has under that name.

    Full statistics are not fetched, since a start uses none.

    Args:
        init_from: A folder, or ``user/repo`` or ``user/repo@revision``.

    Raises:
        ConfigError: if it is neither a folder nor the name of a repository.
        HubError: if it is not a folder, and the repository cannot be fetched.
    """
    if Path(init_from).is_dir():
        return Path(init_from)
    if not isinstance(init_from, str) or not _REPO.fullmatch(init_from) or init_from.startswith((".", "-")):
        raise ConfigError(f"init_from={str(init_from)!r} is neither a folder that exists nor user/repo@revision.")
    repo_id, _, revision = init_from.partition("@")
    from lora_da_hf.hub import pull_init  # needed for this alone

    try:
        return pull_init(repo_id, revision=revision or None, statistics=False)
    except HubError as error:
        raise HubError(f"{error} {init_from} is not a folder in {Path.cwd()} either.") from error


def tag_with_init(model: nn.Module, init_from: str) -> None:
    """Tag a model with the initialisation that its training started from, as ``lora_da_init:<init_from>``.

    transformers and PEFT put a model's tags on every card that they write for it, TRL on those that it pushes.

    Args:
        model: The model.
        init_from: ``repo@commit``, or ``sha256:`` and the hash of the manifest of an initialisation in a folder.
    """
    base: Any = base_model_of(model)
    if isinstance(base, PreTrainedModel):
        base.add_model_tags([f"lora_da_init:{init_from}"])
    else:
        logger.info("LoRA-DA: cards of a %s have no tags, so they will not cite %s", type(base).__name__, init_from)
