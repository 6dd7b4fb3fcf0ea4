"""The notebooks: well-formed, without outputs, and run from top to bottom on a small model."""

import ast
import json
from pathlib import Path

import pytest
from walkthrough import MODEL, cells_of_notebook, make_model_folder, run_steps, write_sums

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_a_notebook_of_format_4_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            ast.parse("".join(cell["source"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    make_model_folder(folder / "model")
    write_sums(folder / "train.jsonl")
    return folder


@pytest.mark.slow
def test_quickstart_runs(place):
    steps = cells_of_notebook(NOTEBOOKS / "quickstart.ipynb", {"MODEL": "model", "NUM_SAMPLES": 16, "STEPS": 1})
    assert "unseen samples" in run_steps(steps, place)
    assert (place / "outputs/quickstart/lora_da/lora_da_manifest.json").is_file()


@pytest.mark.slow
def test_look_into_one_runs(place):
    words = ["init", MODEL, "train.jsonl", "an-init", "--prompt_column", "prompt", "--completion_column", "completion"]
    words += ["--da_num_samples", "16", "--da_search_samples", "2", "--block_size", "32", "--quiet"]
    steps = cells_of_notebook(NOTEBOOKS / "look_into_one.ipynb", {"FOLDER": "an-init"})
    shown = run_steps([("lora-da", words), *steps], place, replace={MODEL: "model"})
    assert "q_proj" in shown
    assert "100%" in shown
