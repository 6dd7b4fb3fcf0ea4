"""The README's Python, run as it stands there."""

import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from lora_da_hf.samples import pad_samples

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_has_its_three_examples():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["trainer", "callback", "function"])
def test_snippet_runs_and_initialises(snippet, tiny_llama, lora_model, token_samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {
        "model": tiny_llama(),
        "peft_model": lora_model(),
        "samples": token_samples(24),
        "train_dataset": token_samples(24),
        "data_collator": pad_samples,
        "args": TrainingArguments(output_dir="out", max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
    }
    exec(snippet, names)
    if "trainer.train()" in snippet:
        assert "LoRA-DA initialisation" in capsys.readouterr().out
    elif "trainer" in names:
        names["trainer"].train()
        assert (tmp_path / "out" / "lora_da" / "adapter_model.safetensors").is_file()
    else:
        assert names["report"].num_samples == 18
        assert (tmp_path / "my-init" / "adapter_model.safetensors").is_file()
