"""docs/sharing.md and the notebook that shares, as a whole, against the Hub of the tests."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from walkthrough import MODEL, blocks_of_document, cells_of_notebook, make_model_folder, run_steps, write_sums

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "hf_alice"  # which the Hub of the tests knows
LOCAL_MODEL = "models/tiny"
NAMES = f"""\
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained("{MODEL}")
data_collator = DataCollatorForSeq2Seq(tokenizer)
ids = tokenizer("1 + 2 = 3")["input_ids"]
train_dataset = [{{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}}] * 8
args = TrainingArguments("out", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def user(hub):
    return HfApi(endpoint=hub.endpoint, token=TOKEN).whoami()["name"]


@pytest.fixture
def environment(hub):
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def test_every_block_of_the_document_runs(user, environment, tmp_path):
    make_model_folder(tmp_path / LOCAL_MODEL)
    write_sums(tmp_path / "train.jsonl")
    steps = [("python", NAMES), *blocks_of_document(REPOSITORY / "docs" / "sharing.md", hub=True)]
    shown = run_steps(steps, tmp_path, replace={MODEL: LOCAL_MODEL, "your-name": user}, environment=environment)
    assert f"{user}/my-init" in shown
    assert (tmp_path / "out").is_dir()
    assert (tmp_path / "my-init-r2" / "lora_da_manifest.json").is_file()


def test_the_notebook_that_shares_runs(user, environment, tmp_path):
    make_model_folder(tmp_path / LOCAL_MODEL)
    parameters = {"MODEL": LOCAL_MODEL, "REPO": f"{user}/my-init", "NUM_SAMPLES": 16, "STEPS": 1}
    steps = cells_of_notebook(REPOSITORY / "notebooks" / "compute_and_share.ipynb", parameters)
    assert f"{user}/my-init" in run_steps(steps, tmp_path, environment=environment)
    assert (tmp_path / "outputs" / "from-hub").is_dir()
