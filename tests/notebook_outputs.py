"""Runs a notebook's code cells as Jupyter does, and stores what they show: `python tests/notebook_outputs.py`."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNNER = """\
import ast, base64, contextlib, io, json, sys
import matplotlib.pyplot as plt

names, shown = {"__name__": "__main__"}, []
for text in json.load(sys.stdin):
    tree, written, images, value = ast.parse(text), io.StringIO(), [], None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(written):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    for number in plt.get_fignums():
        plt.figure(number).savefig(image := io.BytesIO(), bbox_inches="tight", dpi=72)
        images.append(image.getvalue())
    plt.close("all")
    pictures = [base64.b64encode(image).decode() for image in images]
    shown.append([written.getvalue(), pictures, None if value is None else repr(value)])
json.dump(shown, open("shown.json", "w"))
"""


def code_cells(notebook):
    """Return the cells that are run: all with code, but the one that installs the package."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if cell["metadata"].get("tags") != ["install"]]


def outputs_of(cells, folder):
    """Run cells in a process of their own in an empty folder, offline, and return the outputs of each."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # deepspeed says which it finds
    subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(["".join(cell["source"]) for cell in cells]),
        cwd=folder,
        env={**os.environ, **environment},
        text=True,
        check=True,
    )
    return [formatted(*one) for one in json.loads((folder / "shown.json").read_text(encoding="utf-8"))]


def formatted(text, images, result):
    """Return what a cell showed in the format of notebooks."""
    shown = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []
    pictures = [{"image/png": image, "text/plain": ["<a picture>"]} for image in images]
    shown += [{"data": data, "metadata": {}, "output_type": "display_data"} for data in pictures]
    if result is not None:
        data = {"text/plain": result.splitlines(keepends=True)}
        shown += [{"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"}]
    return shown


def store(path):
    """Run a notebook, and write it with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = code_cells(notebook)
    with tempfile.TemporaryDirectory() as folder:
        for number, (cell, outputs) in enumerate(zip(cells, outputs_of(cells, Path(folder)), strict=True), 1):
            cell["execution_count"], cell["outputs"] = number, outputs
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def pngs(outputs):
    """Return the pictures among some outputs."""
    return [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]


if __name__ == "__main__":
    for notebook_path in PATHS:
        store(notebook_path)
