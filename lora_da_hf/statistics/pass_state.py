"""The state of a pass that is under way, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PassState:
    """A pass that is under way, to go on from later to the same bits.

    Attributes:
        tensors: The sums, and the state of torch's random number generator.
        facts: Everything else, as JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class PassStore(Protocol):
    """Where the state of a pass is kept.

    Attributes:
        every: Batches from one state to the next.
    """

    every: int

    def load(self) -> PassState | None:
        """Return the state to go on from, if there is one."""
        ...

    def save(self, state: PassState) -> None:
        """Keep a state in place of the last."""
        ...

    def clear(self) -> None:
        """Forget every state: the pass starts over."""
        ...
