"""Files are on the disk before they get their name."""

import os
from types import SimpleNamespace

from lora_da_hf.artifacts import files


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
