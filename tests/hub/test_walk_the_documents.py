"""docs/sharing.md, the README's lines and the notebook that shares, as a whole, against the Hub of the tests."""

from pathlib import Path

import pytest
from walkthrough import (
    MODEL,
    blocks_of_document,
    blocks_of_readme,
    cells_of_notebook,
    make_model_folder,
    run_steps,
    serve_what_the_readme_names,
    write_sums,
)

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL_MODEL = "models/tiny"
NAMES = f"""\
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained("{MODEL}", pad_token="</s>")
data_collator = DataCollatorForSeq2Seq(tokenizer)
ids = tokenizer("1 + 2 = 3")["input_ids"]
train_dataset = [{{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}}] * 8
args = TrainingArguments("out", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    make_model_folder(tmp_path / LOCAL_MODEL)
    write_sums(tmp_path / "train.jsonl")
    return tmp_path


@pytest.fixture
def environment(hub):
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice"}


def test_every_block_of_the_document_runs(environment, folder):
    steps = [("python", NAMES), *blocks_of_document(REPOSITORY / "docs" / "sharing.md")]
    shown = run_steps(steps, folder, replace={MODEL: LOCAL_MODEL, "your-name": "alice"}, environment=environment)
    assert "alice/my-init" in shown
    assert (folder / "out").is_dir()
    assert (folder / "my-init-r2" / "lora_da_manifest.json").is_file()
    assert {path.name for path in (folder / "my-card").iterdir()} == {"README.md", "guidance_spectra.png"}


def test_every_block_of_the_readme_runs_as_it_is_printed(hub, environment, folder):
    """Models and data sets come from the Hub of the tests. "your-name" is the one thing that a reader replaces."""
    serve_what_the_readme_names(hub, folder)
    steps = blocks_of_readme(REPOSITORY / "README.md")
    assert [kind for kind, _ in steps] == ["python", "python", "lora-da", "lora-da", "python"]
    shown = run_steps(steps, folder, replace={"your-name": "alice"}, environment=environment)
    assert "LoRA-DA initialisation" in shown
    assert shown.count("LoRA-DA: held-out loss") == 3
    assert "(from alice/my-init@" in shown
    for output in ("out", "sft", "shared"):
        assert (folder / output).is_dir()
    (folder / "card.md").write_bytes(hub.repos["alice/my-init"].files["README.md"])
    shown = run_steps(blocks_of_document(folder / "card.md"), folder, environment=environment)
    assert "(from alice/my-init@" in shown


def test_the_notebook_that_shares_runs(hub, environment, folder):
    parameters = {"REPO": "alice/my-init", "LICENSE": "mit"}
    steps = cells_of_notebook(REPOSITORY / "notebooks" / "compute_and_share.ipynb", parameters)
    shown = run_steps(steps, folder, environment=environment)
    assert "from alice/my-init@" in shown
    files = hub.repos["alice/my-init"].files
    assert {"README.md", "guidance_spectra.png"} <= set(files)
    assert "license: mit" in files["README.md"].decode()
