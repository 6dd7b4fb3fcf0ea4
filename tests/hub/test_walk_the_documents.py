"""docs/sharing.md and the notebook that shares, as a whole, against the Hub of the tests."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
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
TOKEN = "hf_alice"  # which the Hub of the tests knows
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


def test_the_lines_of_the_readme_run(user, environment, tmp_path):
    make_model_folder(tmp_path / LOCAL_MODEL)
    write_sums(tmp_path / "train.jsonl")
    steps, others = blocks_of_readme(REPOSITORY / "README.md")
    assert [words[0] for kind, words in steps if kind == "lora-da"] == ["init", "push"]
    assert [kind for kind, _ in steps].count("python") == 1
    assert {"init", "push", *others} <= {verb.name for verb in VERBS}
    given = "model=model, args=args, train_dataset=train_dataset, data_collator=data_collator"
    model = f"""
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from lora_da_hf import LoRADATrainer

model = AutoModelForCausalLM.from_pretrained("{MODEL}")
"""
    steps = [("python", NAMES + model), *steps, ("python", "trainer.train()\nprint(trainer.lora_da_report)")]
    replace = {MODEL: "MODEL", "MODEL": LOCAL_MODEL, "your-name": user, "(..., ": f"({given}, "}
    shown = run_steps(steps, tmp_path, replace=replace, environment=environment)
    assert f"init from   {user}/my-init@" in shown


def test_the_notebook_that_shares_runs(hub, user, environment, tmp_path):
    make_model_folder(tmp_path / LOCAL_MODEL)
    repo = f"{user}/my-init"
    parameters = {"MODEL": LOCAL_MODEL, "REPO": repo, "LICENSE": "apache-2.0", "NUM_SAMPLES": 16, "STEPS": 1}
    steps = cells_of_notebook(REPOSITORY / "notebooks" / "compute_and_share.ipynb", parameters)
    shown = run_steps(steps, tmp_path, environment=environment)
    assert "'license': 'apache-2.0'" in shown
    assert f"{repo}@" in shown
    assert (tmp_path / "outputs" / "from-hub").is_dir()
    files = hub.repos[repo].commits[hub.repos[repo].branches["main"]]
    assert {"README.md", "guidance_spectra.png", "step_search.png"} <= set(files)
    card = files["README.md"].content.decode()
    for said in (
        "sums of two numbers below 20",
        "two CPU cores",
        "It knows nothing but sums.",
        "(guidance_spectra.png)",
    ):
        assert said in card
