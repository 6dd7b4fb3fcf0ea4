"""The client of the Hub, and its errors in this library's words."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_da_hf.errors import HubError, LoRADAError

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "the repository is gated. Accept its conditions on its page, and log in with `hf auth login`."),
    (RepositoryNotFoundError, "there is none, or your token may not read it. Check the name, and `hf auth login`."),
    (RevisionNotFoundError, "the repository has no such branch, tag or commit. Look at its history on its page."),
    (OfflineModeIsEnabled, "the network is off (HF_HUB_OFFLINE), and this needs the Hub. Unset it and try again."),
    (HTTPError, "the Hub could not be reached, or broke off. Check the network and HF_ENDPOINT, or work offline."),
    (LocalEntryNotFoundError, "the cache does not hold all of it. Pull it once with the network on."),
)
"""What the client raises, most specific first."""


@contextlib.contextmanager
def hub_errors(doing: str) -> Generator[None]:
    """Turn what the client raises while ``doing`` something into a `HubError` that says why, and what you can do."""
    try:
        yield
    except LoRADAError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{doing} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    refusal = next((cause for cause in causes if type(cause) is HfHubHTTPError), None)
    if refusal is None:
        known = (reason for kind, reason in _REASONS if any(isinstance(cause, kind) for cause in causes))
        return next(known, str(error).strip() or type(error).__name__)
    status = refusal.response.status_code
    if status == 412:
        return "somebody else pushed meanwhile. Look at what changed, and push again on top of it."
    if status in (401, 403):
        return f"your token does not allow it ({status}). Log in with one that does: `hf auth login`."
    return f"the Hub answered {status} ({refusal.server_message})."
