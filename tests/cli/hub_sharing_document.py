"""docs/sharing.md as a whole, against the Hub of the tests.

Collected under the name ``test_sharing_with_hub.py``; needs the fixture ``hub_server`` (``.endpoint``, ``.token``).
"""

from pathlib import Path

import pytest
from walkthrough import MODEL, blocks_of_document, make_model_folder, run_steps, write_sums

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "sharing.md"
NAMES = """\
from transformers import DataCollatorForSeq2Seq, AutoTokenizer, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
data_collator = DataCollatorForSeq2Seq(tokenizer)
ids = tokenizer("1 + 2 = 3")["input_ids"]
train_dataset = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * 8
args = TrainingArguments("out", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
"""


@pytest.mark.slow
def test_every_block_of_the_document_runs(hub_server, tmp_path):
    make_model_folder(tmp_path / "model")
    write_sums(tmp_path / "train.jsonl")
    steps = blocks_of_document(DOCUMENT, hub=True)
    shown = run_steps(
        [("python", NAMES), *steps],
        tmp_path,
        replace={MODEL: "model", "your-name/": "user/"},
        environment={"HF_ENDPOINT": hub_server.endpoint, "HF_TOKEN": hub_server.token},
    )
    assert "user/my-init" in shown
    assert (tmp_path / "my-init-r2" / "lora_da_manifest.json").is_file()
