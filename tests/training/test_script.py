import difflib

import pytest
from harness import LINEAR_LAYERS, make_learnable_samples, make_tokenizer
from peft import PeftModel

# transformers' own recipe for causal language modelling (its task guide), with the model and the data of a test
SCRIPT = """\
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained(BASE)
dataset = load_dataset("text", data_files={"train": TRAIN_FILE, "test": TEST_FILE}, cache_dir=CACHE)


def preprocess_function(examples):
    return tokenizer(examples["text"], return_token_type_ids=False)


def group_texts(examples):
    concatenated = {k: sum(examples[k], []) for k in examples.keys()}
    total_length = (len(concatenated["input_ids"]) // block_size) * block_size
    result = {
        k: [t[i : i + block_size] for i in range(0, total_length, block_size)] for k, t in concatenated.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


block_size = 16
tokenized = dataset.map(preprocess_function, batched=True, remove_columns=dataset["train"].column_names)
lm_dataset = tokenized.map(group_texts, batched=True)

data_collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
model = AutoModelForCausalLM.from_pretrained(BASE)

training_args = TrainingArguments(
    output_dir=OUTPUT,
    eval_strategy="epoch",
    learning_rate=2e-3,
    weight_decay=0.01,
    num_train_epochs=1,
    report_to="none",
    use_cpu=True,
)

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=lm_dataset["train"],
    eval_dataset=lm_dataset["test"],
    data_collator=data_collator,
)

trainer.train()
eval_results = trainer.evaluate()
trainer.save_model(OUTPUT + "/final")
"""

CHANGES = {
    "from transformers import Trainer, TrainingArguments\n": (
        "from transformers import TrainingArguments\n"
        "from peft import LoraConfig\n"
        "from lora_da_hf import LoRADAConfig, LoRADATrainer as Trainer\n"
    ),
    "    data_collator=data_collator,\n": (
        "    data_collator=data_collator,\n"
        '    peft_config=LoraConfig(target_modules="all-linear"),\n'
        "    da_config=LoRADAConfig(num_samples=16),\n"
    ),
}


@pytest.fixture
def names(tmp_path, tiny_llama):
    """Return what the script finds in its namespace: where its model, its data and its output are."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    for name, count, seed in (("train", 120, 0), ("test", 20, 1)):
        lines = [" ".join(f"w{t}" for t in s["input_ids"]) for s in make_learnable_samples(count, seed=seed)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return {
        "BASE": str(base),
        "TRAIN_FILE": str(tmp_path / "train.txt"),
        "TEST_FILE": str(tmp_path / "test.txt"),
        "CACHE": str(tmp_path / "cache"),
        "OUTPUT": str(tmp_path / "output"),
    }


def run(script, names):
    namespace = dict(names)
    exec(compile(script, "script", "exec"), namespace)
    return namespace


def test_transformers_recipe_needs_another_import_and_two_arguments(names, tmp_path, tiny_llama):
    script = SCRIPT
    for old, new in CHANGES.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    changed = [line for line in difflib.ndiff(SCRIPT.splitlines(), script.splitlines()) if line[0] in "+-"]
    assert [line for line in changed if "import" not in line and line[0] == "-"] == []
    assert len([line for line in changed if "import" not in line]) == 2

    found = run(script, names)
    trainer = found["trainer"]
    report = trainer.lora_da_report
    assert len(report.layers) == LINEAR_LAYERS
    assert report.num_samples == 16
    assert report.step_size > 0
    assert trainer.state.log_history[0]["lora_da_step_size"] == report.step_size
    assert found["eval_results"]["eval_loss"] < report.unseen_loss_before
    trained = PeftModel.from_pretrained(tiny_llama(), tmp_path / "output" / "final")
    start = PeftModel.from_pretrained(tiny_llama(), tmp_path / "output" / "lora_da")
    batch = found["data_collator"]([found["lm_dataset"]["test"][i] for i in range(8)])
    losses = [model.eval()(**batch).loss.item() for model in (trained, start, tiny_llama())]
    assert losses == sorted(losses)
