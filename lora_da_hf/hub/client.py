"""The client of the Hub, its errors in this library's words, and what a repo says of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_da_hf.artifacts.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest
from lora_da_hf.artifacts.strict_json import too_large
from lora_da_hf.errors import ArtifactError, HubError, LoRADAError

LIBRARY = "lora_da_hf"


def make_api(*, token: str | bool | None, endpoint: str | None) -> HfApi:
    """Return a client.

    Args:
        token: A token; None: the one of the environment or the login; False: none.
        endpoint: Where the Hub is; None: ``HF_ENDPOINT``, or huggingface.co.
    """
    return HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)


@contextlib.contextmanager
def hub_errors(doing: str) -> Generator[None]:
    """Turn what the client raises into a `HubError` that says what was being done, and what to do about it.

    Args:
        doing: Such as ``"Pulling user/repo"``.
    """
    try:
        yield
    except (LoRADAError, torch.OutOfMemoryError):
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{doing} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "the repo is gated. Accept its conditions on its page, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repo, or it is private and the token in use may not read it. Check the name, and log in "
            "with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such branch, tag or commit. Look at its history on its page."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the repo has no {MANIFEST_FILE} or lacks a file of it, so it holds no complete LoRA-DA initialisation."
    text = str(error).strip().rstrip(".") or type(error).__name__
    if isinstance(error, ValueError) and not isinstance(error, HTTPError):
        return f"{text}. Correct that and try again."
    refusal = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if refusal is not None:
        return _refusal(refusal)
    if any(isinstance(cause, HTTPError) for cause in _causes(error)):
        return "the Hub could not be reached, or broke off. Check the network and HF_ENDPOINT, or work offline."
    if isinstance(error, OfflineModeIsEnabled):
        return "the network is off (HF_HUB_OFFLINE), and this needs the Hub. Unset it and try again."
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not completely in the cache, and the network is off. Pull it once with the network on."
    return f"{text}. Correct that and try again."


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 412:
        return "somebody else pushed meanwhile. Look at what changed, and push again on top of it."
    if status in (401, 403):
        return f"the token in use does not allow it ({status}). Log in with one that does: `hf auth login`."
    said = f" ({error.server_message.strip().rstrip('.')})" if error.server_message else ""
    return f"the Hub answered {status}{said}. Correct that, or try again later."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def check_tree(manifest: Manifest, info: ModelInfo) -> None:
    """Compare the sizes, and for LFS files the hashes, that a repo announces with those in the manifest.

    Args:
        manifest: From that repo and commit.
        info: Of the commit, with the metadata of its files.

    Raises:
        ArtifactError: naming the first file that is missing or another one.
    """
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for name, entry in manifest.files.items():
        found = files.get(name)
        if found is None:
            raise ArtifactError(f"{info.id} at {info.sha} has no {name}, which its manifest lists. Do not use it.")
        announced = {"size": (found.size, entry.size)}
        if found.lfs is not None:
            announced["SHA-256"] = (found.lfs.sha256, entry.sha256)  # pyright: ignore[reportArgumentType]
        for what, (value, expected) in announced.items():
            if value != expected:
                raise ArtifactError(
                    f"{info.id} at {info.sha}: {name} has {what} {value} and its manifest says {expected}. "
                    "Do not use it."
                )


def check_manifest_size(info: ModelInfo) -> None:
    """Verify that a repo has a manifest of an ordinary size, before it is fetched.

    Raises:
        HubError: if it has none.
        ArtifactError: if it is too large.
    """
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    if MANIFEST_FILE not in sizes:
        raise HubError(f"{info.id} at {info.sha} has no {MANIFEST_FILE}: it holds no LoRA-DA initialisation.")
    size = sizes[MANIFEST_FILE] or 0
    if size > MAX_MANIFEST_BYTES:
        raise too_large(f"{info.id} at {info.sha}: {MANIFEST_FILE}", size, MAX_MANIFEST_BYTES)
