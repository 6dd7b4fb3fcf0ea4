"""Files are on the disk before they get their name."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from lora_da_hf.artifacts import files
from lora_da_hf.errors import ArtifactError


def test_a_finished_file_replaces_the_one_of_its_name(tmp_path):
    (tmp_path / "partial").write_text("new")
    (tmp_path / "file").write_text("old")
    files.put_in_place(tmp_path / "partial", tmp_path / "file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_windows_syncs_files_that_are_open_for_writing_and_no_folders(tmp_path, monkeypatch):
    opened = []

    def recorded(path, flags):
        opened.append((path, flags))
        return os.open(path, flags)

    system = {name: getattr(os, name) for name in ("O_RDONLY", "O_RDWR", "fsync", "close")}
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", open=recorded, **system))
    (tmp_path / "file").write_text("content")
    files.sync(tmp_path / "file")
    files.sync(tmp_path)
    assert opened == [(tmp_path / "file", os.O_RDWR)]


def test_a_full_disk_is_an_error_that_says_how_much_room_is_missing(tmp_path, monkeypatch):
    def save_file(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", save_file)
    message = (
        r"basis could not be written \(I/O error: No space .*\). It takes 4 MiB, and .* MiB are free there: make room"
    )
    with pytest.raises(ArtifactError, match=message):
        files.write_tensors(tmp_path / "basis", {"a": torch.zeros(2**20)}, {"format": "pt"})


def test_a_file_system_that_syncs_no_folder_is_no_error(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", fsync)
    files.sync(tmp_path)
    (tmp_path / "file").write_text("content")
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "file")
