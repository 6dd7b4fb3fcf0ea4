"""The notebooks: well-formed, and stored with what their code shows, up to numbers."""

import ast
import json
import re

import pytest
from notebook_outputs import PATHS, ROOT, code_cells, outputs_of, pngs

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@each
def test_is_a_notebook_of_format_4_that_starts_by_itself(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(isinstance(line, str) for cell in notebook["cells"] for line in cell["source"])
    install = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    name = re.search(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert "".join(install["source"]) == f'%pip install --quiet "{name.replace("_", "-")}[plot]"'
    assert install["outputs"] == []


@each
def test_stored_outputs_are_whole_and_small(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        ast.parse("".join(cell["source"]))
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        for picture in pngs(cell["outputs"]):
            assert picture.startswith(b"\x89PNG")
            assert len(picture) <= 40_000


def test_the_first_one_draws_plain_lora_beside_lora_da():
    (cell,) = [cell for cell in code_cells(read(ROOT / "notebooks" / "quickstart.ipynb")) if pngs(cell["outputs"])]
    (stream,) = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    assert [re.split(r"\s+\d", line)[0] for line in stream["text"]] == ["plain LoRA", "LoRA-DA"]


def masked(outputs):
    """Return what was shown without numbers, hashes and the widths of columns; lines alike in a row count once."""
    shown = []
    for output in outputs:
        lines = output.get("text") or output["data"]["text/plain"]
        for line in lines:
            line = re.sub(r"\b[0-9a-f]{16,}\b|[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", line)
            line = re.sub(r"[ -]+", " ", line).strip()
            shown += [line] if shown[-1:] != [line] else []
    return shown


def test_numbers_alone_are_masked():
    stored = {"text": ["loss  1.25 -> -3e-05 (-6.1 %)\n", "loss  7 -> 1,024 (+6 %)\n", "a  b\n"]}
    assert masked([stored]) == ["loss # > # (# %)", "a b"]
    assert masked([{"text": ["a c\n"]}]) != masked([{"text": ["a b\n"]}])


@pytest.mark.slow
@each
def test_stored_outputs_are_what_the_code_shows(path, tmp_path):
    cells = code_cells(read(path))
    for cell, outputs in zip(cells, outputs_of(cells, tmp_path), strict=True):
        where = f"cell {cell['id']}: run python tests/notebook_outputs.py"
        assert len(pngs(cell["outputs"])) == len(pngs(outputs)), where
        assert masked(cell["outputs"]) == masked(outputs), where
