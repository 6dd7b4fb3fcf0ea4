"""An adapter that was trained from a published initialisation and pushed by the trainer cites it."""

import pytest
import yaml
from walkthrough import make_model_folder, run_steps

ARGUMENTS = """\
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lora_da_hf import LoRADACallback, LoRADAConfig, LoRADATrainer, initialize_lora_da
from lora_da_hf.hub import push_init
from lora_da_hf.samples import pad_samples

model = AutoModelForCausalLM.from_pretrained("model")
lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
ids = [5, 9, 7, 4, 8, 6]
samples = [{"input_ids": ids[k % 3 :], "labels": ids[k % 3 :]} for k in range(12)]
config = LoRADAConfig(num_samples=6, search_samples=0, step_size=0.1)
fresh = AutoModelForCausalLM.from_pretrained("model")
initialize_lora_da(get_peft_model(fresh, lora), samples, config=config, output_dir="init", progress=False)
pushed = push_init("init", "alice/init", card="")


def settings(name, model, **others):
    return {
        "model": model,
        "args": TrainingArguments(
            f"out/{name}", max_steps=1, push_to_hub=True, hub_model_id=f"alice/{name}", report_to="none", use_cpu=True
        ),
        "train_dataset": samples,
        "data_collator": pad_samples,
        **others,
    }


own = LoRADATrainer(**settings("own", model, peft_config=lora, init_from="alice/init"))
own.train()
own.push_to_hub()
adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), lora)
other = Trainer(**settings("other", adapted, callbacks=[LoRADACallback(init_from="alice/init")]))
other.train()
other.push_to_hub()
print(pushed.oid)
"""


@pytest.mark.slow
def test_the_card_that_a_trainer_pushes_cites_repo_and_commit(hub, tmp_path):
    make_model_folder(tmp_path / "model")
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice"}
    cited = f"alice/init@{run_steps([('python', ARGUMENTS)], tmp_path, environment=environment).split()[-1]}"
    for name in ("own", "other"):
        repo = hub.repos[f"alice/{name}"]
        cards = [files["README.md"].decode() for files in repo.commits.values() if "README.md" in files]
        assert cards
        for card in cards:
            assert f"lora_da_init:{cited}" in yaml.safe_load(card.split("---\n")[1])["tags"]
        assert str(tmp_path) not in str(repo.files)
