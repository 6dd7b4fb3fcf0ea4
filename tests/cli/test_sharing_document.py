"""docs/sharing.md, as far as it needs no Hub."""

import json
from pathlib import Path

import pytest
from walkthrough import MODEL, blocks_of_document, make_model_folder, run_steps, write_sums

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "sharing.md"


@pytest.mark.slow
def test_blocks_that_need_no_hub_run(tmp_path):
    make_model_folder(tmp_path / "model")
    write_sums(tmp_path / "train.jsonl")
    steps = blocks_of_document(DOCUMENT, hub=False)
    assert [words[0] for _, words in steps] == ["init", "show", "verify", "verify", "card", "show", "verify"]
    shown = run_steps(steps, tmp_path, replace={MODEL: "model"})
    *_, facts, verified = shown.strip().splitlines()
    assert json.loads(facts)["max_rank"] == 8
    assert verified == "ok"
    assert {path.name for path in (tmp_path / "my-card").iterdir()} == {
        "README.md",
        "guidance_spectra.png",
        "step_search.png",
    }
