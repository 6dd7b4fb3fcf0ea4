"""What an initialisation that is under way keeps on disk: sums of the running window, solutions of finished ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_da_hf.artifacts.files import put_in_place, write_tensors
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.errors import ArtifactError

_RUN_FILE = "run.json"
_GENERATIONS = 2
_VALUES = "values"


class CheckpointFolder:
    """A folder of safetensors and JSON, each file of which is there as a whole or not at all.

    ``run.json``, the finished windows and their statistics are the main process's; each process has files of its own
    for its sums, of which the last two are kept. Processes that share no file system have a folder each.

    Attributes:
        path: Where. It is made when something is written.

    Args:
        folder: The initialisation's own folder, beside which this one is.
        rank: The number of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder.parent / f"_{folder.name}.checkpoint"  # which no trainer uploads
        self._rank = rank
        self._run = ""

    @property
    def statistics(self) -> Path:
        """Where the statistics of finished windows wait, if they are to be stored."""
        return self.path / "statistics"

    def read_run(self) -> dict[str, Any] | None:
        """Return what `begin` wrote, or None if there is nothing.

        Raises:
            ArtifactError: if it is not what was written.
        """
        file = self.path / _RUN_FILE
        if not self.has_run():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{file} is no JSON: it was changed. Delete {self.path} to start over.") from error
        if not isinstance(values, dict):
            raise ArtifactError(f"{file} was changed. Delete {self.path} to start over.")
        return values

    def has_run(self) -> bool:
        """Tell whether `begin` wrote something."""
        return (self.path / _RUN_FILE).is_file()

    def begin(self, values: Mapping[str, Any]) -> None:
        """Go on with the run that these values describe, or start it; files of others are deleted or not looked at."""
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        self._run = hashlib.sha256(text.encode()).hexdigest()[:12]
        others = [file for file in self.path.glob(f"sums-{self._rank:05d}-*") if not file.name.endswith(self._ending)]
        if self._rank == 0 and not self._is_run_of(text):
            shutil.rmtree(self.statistics, ignore_errors=True)
            others += list(self.path.glob("window-*"))
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self._partial(_RUN_FILE)
            partial.write_text(text, encoding="utf-8")
            put_in_place(partial, self.path / _RUN_FILE)
        for file in others:
            file.unlink()

    def write_sums(self, window: int, batches: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write this process's sums of a window after some batches, and delete all but these and the ones before."""
        self._write(self._sums_file(window, batches), tensors, values)
        kept = {self._sums_file(window, number) for number in self.sums(window)[:_GENERATIONS]}
        for file in self.path.glob(f"sums-{self._rank:05d}-*"):
            if file.name not in kept:
                file.unlink()

    def delete_sums(self, window: int) -> None:
        """Delete this process's sums of a window."""
        for batches in self.sums(window):
            (self.path / self._sums_file(window, batches)).unlink()

    def sums(self, window: int) -> list[int]:
        """Return after how many batches there are sums of a window that can be read, the newest first."""
        files = self.path.glob(f"sums-{self._rank:05d}-{window:05d}-*{self._ending}")
        return sorted((int(file.name.split("-")[3]) for file in files if _is_whole(file)), reverse=True)

    def read_sums(self, window: int, batches: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `write_sums` was given.

        Raises:
            ArtifactError: if the file was changed.
        """
        return self._read(self._sums_file(window, batches))

    def write_window(self, window: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write what came of a window."""
        self._write(self._window_file(window), tensors, values)

    def read_window(self, window: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what `write_window` was given, or None if the window is not finished.

        Raises:
            ArtifactError: if the file was changed.
        """
        name = self._window_file(window)
        return self._read(name) if (self.path / name).is_file() else None

    def remove(self) -> None:
        """Delete what this process wrote, and the folder with the last of it."""
        if self._rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError):  # the first process may be faster
            for pattern in (f"sums-{self._rank:05d}-*", f".{self._rank:05d}-*"):
                for file in self.path.glob(pattern):
                    file.unlink()
        with contextlib.suppress(OSError):  # it is gone, or others' files are in it
            self.path.rmdir()

    def _is_run_of(self, text: str) -> bool:
        return self.has_run() and (self.path / _RUN_FILE).read_text(encoding="utf-8", errors="replace") == text

    @property
    def _ending(self) -> str:
        return f"-{self._run}.safetensors"

    def _sums_file(self, window: int, batches: int) -> str:
        return f"sums-{self._rank:05d}-{window:05d}-{batches:07d}{self._ending}"

    def _window_file(self, window: int) -> str:
        return f"window-{window:05d}{self._ending}"

    def _partial(self, name: str) -> Path:
        return self.path / f".{self._rank:05d}-{name}.partial"

    def _write(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self._partial(name)
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_tensors(partial, on_cpu, {_VALUES: json.dumps(values)})
        put_in_place(partial, self.path / name)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        file = self.path / name
        tensors = read_tensors(file, None)
        with safe_open(file, framework="pt") as opened:
            values = (opened.metadata() or {}).get(_VALUES)
        if values is None:
            raise ArtifactError(f"{file} is not what was written there. Delete {self.path} to start over.")
        return tensors, json.loads(values)


def _is_whole(file: Path) -> bool:
    """Tell whether a file is as long as its header says, which is all that a damaged disk usually changes."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
