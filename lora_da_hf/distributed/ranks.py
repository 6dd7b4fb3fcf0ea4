"""The few collective operations that an initialisation needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_da_hf.errors import ConfigError, LoRADAError, OutOfStepError, PeerFailed, PeerGone

T = TypeVar("T")


class Ranks:
    """The processes that share the work. With one process every operation does nothing.

    Attributes:
        rank: This process's number.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._known_failure: Exception | None = None

    @classmethod
    def alone(cls) -> Ranks:
        """Return this process as the only one, for work that is shared with none."""
        return cls(0, 1)

    @classmethod
    def current(cls) -> Ranks:
        """Return the processes of the default process group, or this one alone if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls.alone()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of the items: every size-th, from its rank on."""
        return list(items[self.rank :: self.size])

    def reduce_sum_(self, tensor: Tensor, owner: int) -> None:
        """Sum ``tensor`` over the processes into the owner's, in place; the others' is then undefined."""
        if self.size > 1:
            with _reporting_lost_peers():
                dist.reduce(tensor, dst=owner)

    def broadcast(
        self, tensors: Sequence[Tensor] | None, specs: Sequence[tuple[Sequence[int], torch.dtype]], source: int
    ) -> list[Tensor]:
        """Return the source's tensors on every process: all of them in one message.

        Args:
            tensors: At the source, the tensors, on one device; elsewhere None.
            specs: Shape and dtype of each, known to all.
            source: The process that has them.

        Returns:
            The tensors themselves at the source, and copies on the default device of the collectives elsewhere.
        """
        if self.size == 1 or not specs:
            return list(tensors or [])
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
        if tensors is not None:
            flat = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
            flat = flat.to(_collective_device())
        else:
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=_collective_device())
        with _reporting_lost_peers():
            dist.broadcast(flat, src=source)
        if tensors is not None:
            return list(tensors)
        parts = flat.split(sizes)  # cloned: a view of eight-byte numbers has to begin at a multiple of eight
        return [part.clone().view(dtype).reshape(shape) for part, (shape, dtype) in zip(parts, specs, strict=True)]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, on all of them: small objects, since they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _reporting_lost_peers():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Verify that all processes have the same facts.

        Args:
            facts: Small values by name.

        Raises:
            ConfigError: on all of them, naming what differs.
        """
        everywhere = self.gather(dict(facts))
        first = everywhere[0]
        for rank, other in enumerate(everywhere):
            names = [name for name in (*first, *other) if first.get(name) != other.get(name)]
            if names:
                name = names[0]
                raise ConfigError(
                    f"The processes differ in {', '.join(dict.fromkeys(names))}: process 0 has "
                    f"{name}={_short(first.get(name))}, and process {rank} has {_short(other.get(name))}. Give all "
                    "processes the same."
                )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over the processes, the same bits on all of them."""
        return [sum(column) for column in zip(*self.gather(tuple(values)), strict=True)]

    @contextlib.contextmanager
    def together(self, stage: str) -> Generator[None]:
        """Make a stage without collectives fail on all processes if it fails on one, so that none waits for ever.

        Args:
            stage: Its name, for the message.

        Raises:
            PeerFailed: if another process failed; PeerGone: if one is gone.
        """
        failure: Exception | None = None
        try:
            yield
        except OutOfStepError:
            raise  # the others are not here to be told
        except Exception as error:
            failure = error
        self._known_failure = failure
        if self.size > 1:
            try:
                messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
            except PeerGone:
                self._known_failure = None
                if failure is not None:
                    raise failure from None
                raise
            failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
            if failed and failure is None:
                rank, message = failed[0]
                raise PeerFailed(f"Process {rank} failed in the {stage}: {message}")
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def alike(self, stage: str, shared: type[Exception]) -> Generator[None]:
        """Do as `together` does, but a failure of one kind is raised as such by all processes if it is by one.

        Args:
            stage: Its name, for the message.
            shared: The kind.
        """
        reason: Exception | None = None
        with self.together(stage):
            try:
                yield
            except shared as error:
                reason = error
        reasons = [text for text in self.gather(None if reason is None else str(reason)) if text is not None]
        if reasons:
            raise reason or shared(reasons[0])

    @contextlib.contextmanager
    def in_step(self, stage: str, *, known: type[Exception] = PeerFailed) -> Generator[None]:
        """Mark a failure in a stage with collectives, of which this process cannot tell the others.

        Args:
            stage: Its name, for the message.
            known: A kind of failure that all processes have if one does, and that is left as it is.

        Raises:
            OutOfStepError: from whatever failed.
        """
        try:
            yield
        except (OutOfStepError, PeerFailed, known):
            raise
        except Exception as error:
            raise OutOfStepError(
                f"Process {self.rank} failed in the {stage}: {type(error).__name__}: {error}. The others may wait for "
                "it in the middle of that stage, where they cannot be told: end them too."
            ) from error

    def stage(
        self, name: str, *, has_collectives: bool, known: type[Exception] = PeerFailed
    ) -> contextlib.AbstractContextManager[None]:
        """Return `in_step` for a stage with collectives, and `together` for one without."""
        return self.in_step(name, known=known) if has_collectives and self.size > 1 else self.together(name)

    def all_fail_with(self, error: BaseException) -> bool:
        """Tell whether all processes fail when this one does with an error, so that they can still do things together.

        They do with what `together` raised, and with this library's own errors, which follow from what all have.
        """
        if self.size == 1 or error is self._known_failure:
            return True
        return isinstance(error, LoRADAError) and not isinstance(error, (OutOfStepError, PeerGone))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _collective_device() -> torch.device:
    """Return a device that the process group can send from: NCCL's is this process's GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


@contextlib.contextmanager
def _reporting_lost_peers() -> Generator[None]:
    """Say what it means when a collective operation breaks: torch speaks of sockets and timeouts."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise  # this process's own
    except RuntimeError as error:
        raise PeerGone(
            f"Another process is gone, or did not answer within the timeout of the process group ({error}). See its "
            "own output for why (a process that is killed leaves none: often memory). Start all processes again."
        ) from error


def balanced_owners(costs: dict[str, float], size: int) -> dict[str, int]:
    """Assign items to processes so that the largest total cost is small: costliest first, to the least loaded.

    Args:
        costs: Cost of each item.
        size: How many processes there are.

    Returns:
        The process of each item; the same on every process.
    """
    load = [0.0] * size
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner = min(range(size), key=load.__getitem__)
        owners[name] = owner
        load[owner] += costs[name]
    return owners
