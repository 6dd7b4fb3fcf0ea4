"""Errors as a message and a hint."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from lora_da_hf.errors import LoRADAError

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN. Check that the token may do this."

_MAKE_ROOM = "Make room or choose another folder, and run it again."
_CHECK_PATH = "Check the path."
_OF_THE_SYSTEM = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.ENOENT: _CHECK_PATH,
    errno.ENOTDIR: _CHECK_PATH,
    errno.EISDIR: _CHECK_PATH,
    errno.EACCES: "Check who may read and write it.",
    errno.EPERM: "Check who may read and write it.",
    errno.EROFS: "Choose a folder that can be written.",
}
_WITH_TRACEBACK = "Run it again with --debug for the traceback."


def explain(error: Exception) -> tuple[str, str | None]:
    """Return what went wrong, and what to do about it where the message does not say that."""
    if isinstance(error, LoRADAError):
        return str(error), None
    found = _from_hub(error) or _from_torch(error) or _from_safetensors(error)
    if found is not None:
        return found
    if isinstance(error, OSError):
        if error.errno is not None:  # of the operating system
            return _first_lines(error), _OF_THE_SYSTEM.get(error.errno, _WITH_TRACEBACK)
        return _first_lines(error), "Check the name or path; a private or gated model needs `hf auth login`."
    return f"unexpected {type(error).__name__}: {_first_lines(error)}", _WITH_TRACEBACK


def _from_hub(error: Exception) -> tuple[str, str] | None:
    """Explain an error of huggingface_hub, which can only be one if that is imported."""
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "This repository is gated.", f"Ask for access on its page. {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "This repository does not exist, or you may not see it.", _LOG_IN
    if isinstance(error, errors.RevisionNotFoundError):
        return "This repository has no such revision.", "Give a branch, a tag or a whole commit."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "You are not logged in.", _LOG_IN
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return _first_lines(error), "Unset HF_HUB_OFFLINE, or check the connection and HF_ENDPOINT."
    if isinstance(error, errors.HfHubHTTPError):
        status: Any = getattr(error.response, "status_code", None)
        return _first_lines(error), _LOG_IN if status in (401, 403) else "Check the connection and HF_ENDPOINT."
    return None


def _from_torch(error: Exception) -> tuple[str, str] | None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return _first_lines(error), "Lower --da_batch_size or --block_size."
    return None


def _from_safetensors(error: Exception) -> tuple[str, str] | None:
    """Explain an error of the library that writes safetensors, which has the system's reason in its text alone."""
    safetensors: Any = sys.modules.get("safetensors")
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        full = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT) if os.strerror(code) in str(error)]
        if full:
            return f"the disk is full: {_first_lines(error)}", _MAKE_ROOM
    return None


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).strip().splitlines()[:4]) or type(error).__name__
