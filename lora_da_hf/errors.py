"""Every error that this library raises on purpose.

Each message says what failed, for which layer or file, what was found, and the one thing to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoRADAError(Exception):
    """Base of every error of this library."""


class ConfigError(LoRADAError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class TargetError(LoRADAError, ValueError):
    """The model has no LoRA layer that can be initialised, or is in a state that forbids it."""


class AdapterAlreadyTrainedError(TargetError):
    """The adapter is not a fresh one: overwriting it would lose training."""


class UnsupportedSetupError(LoRADAError, RuntimeError):
    """The training run is of a kind that an initialisation cannot be made in."""


class DataError(LoRADAError, ValueError):
    """The samples cannot be used: none at all, none with a label, too long, or of an unknown form."""


class StatisticsError(LoRADAError, RuntimeError):
    """The statistics pass gave something that cannot be used."""


class NonFiniteError(StatisticsError):
    """A loss, a statistic or a stored tensor is NaN or infinite."""


class PlanError(LoRADAError, RuntimeError):
    """The statistics do not fit in the memory that they may take."""


class SolveError(LoRADAError, RuntimeError):
    """A layer's factorisation or eigenproblem could not be solved, even with more damping."""


class WriteError(LoRADAError, RuntimeError):
    """What was written to the adapter is not what is read back."""


class ArtifactError(LoRADAError, ValueError):
    """A stored initialisation is missing, truncated, tampered with or of another schema."""


class BaseModelMismatchError(ArtifactError):
    """A stored initialisation was computed for another base model."""


class HubError(LoRADAError, RuntimeError):
    """The Hub refused, could not be reached, or does not have what was asked for."""


def do_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that names what was probably meant, to stand behind an error; empty if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Do you mean {close[0]!r}?" if close else ""
