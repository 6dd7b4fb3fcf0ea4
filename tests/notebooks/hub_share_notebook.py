"""The notebook that shares an initialisation, against the Hub of the tests.

Collected under the name ``test_share_notebook.py``; needs the fixture ``hub_server`` (``.endpoint``, ``.token``).
"""

from pathlib import Path

import pytest
from walkthrough import cells_of_notebook, make_model_folder, run_steps

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "compute_and_share.ipynb"


@pytest.mark.slow
def test_compute_and_share_runs(hub_server, tmp_path):
    make_model_folder(tmp_path / "model")
    parameters = {"MODEL": "model", "REPO": "user/my-init", "NUM_SAMPLES": 16, "STEPS": 1}
    shown = run_steps(
        cells_of_notebook(NOTEBOOK, parameters),
        tmp_path,
        environment={"HF_ENDPOINT": hub_server.endpoint, "HF_TOKEN": hub_server.token},
    )
    assert "user/my-init" in shown
    assert (tmp_path / "outputs/from-hub").is_dir()
