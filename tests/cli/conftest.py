import pytest
from walkthrough import make_model_folder, write_sums

from lora_da_hf.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a small model and a file of data."""
    folder = tmp_path_factory.mktemp("place")
    make_model_folder(folder / "model")
    write_sums(folder / "train.jsonl")
    return folder


@pytest.fixture
def lora_da(capfd):
    """Return ``lora_da(*words) -> (exit code, stdout, stderr)``."""

    def run(*words):
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as left:
            code = left.code
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return run
