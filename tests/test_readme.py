"""The README's Python, run as it stands there."""

import json
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments
from walkthrough import make_model_folder

from lora_da_hf.samples import pad_samples

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ELSEWHERE = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"model"',
    '"openai/gsm8k", "main"': '"json", data_files="train.jsonl"',
    "max_steps=40": "max_steps=2, use_cpu=True",
}


def test_it_is_short_and_has_its_two_examples():
    assert len(TEXT.split()) <= 900
    assert len(SNIPPETS) == 2


def test_the_first_example_runs_when_pasted(tmp_path, monkeypatch, capsys):
    make_model_folder(tmp_path / "model")
    rows = [{"question": f"{k} + {k % 7} =", "answer": f" {k + k % 7}"} for k in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    snippet = SNIPPETS[0]
    for there, here in ELSEWHERE.items():
        assert snippet.count(there) == 1
        snippet = snippet.replace(there, here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(snippet, {})
    assert "LoRA-DA initialisation" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "lora_da" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("snippet", SNIPPETS[1:], ids=["callback"])
def test_a_snippet_with_names_of_your_own_initialises(
    snippet, tiny_llama, lora_model, token_samples, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {
        "model": tiny_llama(),
        "peft_model": lora_model(),
        "train_dataset": token_samples(24),
        "data_collator": pad_samples,
        "args": TrainingArguments(output_dir="out", max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
    }
    exec(snippet, names)
    names["trainer"].train()
    assert (tmp_path / "out" / "lora_da" / "adapter_model.safetensors").is_file()
