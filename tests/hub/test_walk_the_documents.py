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
    write_sums,
)

from lora_da_hf.cli.main import VERBS

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


def test_the_lines_of_the_readme_run(environment, folder):
    steps, others = blocks_of_readme(REPOSITORY / "README.md")
    assert [words[0] for kind, words in steps if kind == "lora-da"] == ["init", "push"]
    assert {"init", "push", *others} <= set(VERBS)
    given = "model=model, args=args, train_dataset=train_dataset, data_collator=data_collator"
    model = f"""
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from lora_da_hf import LoRADATrainer

model = AutoModelForCausalLM.from_pretrained("{MODEL}")
"""
    steps = [("python", NAMES + model), *steps, ("python", "trainer.train()\nprint(trainer.lora_da_report)")]
    replace = {MODEL: "MODEL", "MODEL": LOCAL_MODEL, "your-name": "alice", "(..., ": f"({given}, "}
    assert "alice/my-init@" in run_steps(steps, folder, replace=replace, environment=environment)


def test_the_notebook_that_shares_runs(hub, environment, folder):
    parameters = {"MODEL": LOCAL_MODEL, "REPO": "alice/my-init", "LICENSE": "mit", "NUM_SAMPLES": 16, "STEPS": 1}
    steps = cells_of_notebook(REPOSITORY / "notebooks" / "compute_and_share.ipynb", parameters)
    shown = run_steps(steps, folder, environment=environment)
    assert "alice/my-init@" in shown
    assert (folder / "outputs" / "from-hub").is_dir()
    files = hub.repos["alice/my-init"].files
    assert {"README.md", "guidance_spectra.png"} <= set(files)
    assert "license: mit" in files["README.md"].decode()
