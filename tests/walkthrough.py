"""Runs documents and notebooks as a reader would: their blocks in order, in a process of their own."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent
MODEL = "HuggingFaceTB/SmolLM2-135M"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +=.,"

RUNNER = """\
import json, sys

names = {"__name__": "__main__"}
for kind, text in json.loads(sys.stdin.read()):
    print(f"[{kind}] {text}", file=sys.stderr, flush=True)
    if kind == "python":
        exec(compile(text, "<block>", "exec"), names)
    else:
        from lora_da_hf.cli.main import main

        code = main(json.loads(text))
        if code:
            sys.exit(f"exit code {code}")
"""


CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role[0] + '+' + turn.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a+{% endif %}"
)


def make_model_folder(folder, *, with_chat_template=False):
    """Save a small random Llama with a tokenizer of single characters, which has no token for padding, as many have."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{character: 3 + k for k, character in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words)}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
    made.chat_template = CHAT_TEMPLATE if with_chat_template else None
    made.save_pretrained(folder)
    return folder


def write_sums(path, count=64):
    """Write rows with a prompt and a completion."""
    rows = [{"prompt": f"{k} + {k % 7} =", "completion": f" {k + k % 7}"} for k in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def blocks_of_document(path):
    """Return the fenced blocks of a document as steps."""
    found = re.findall(r"```(bash|python)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return [step for kind, text in found for step in ([(kind, text)] if kind == "python" else commands(text))]


def blocks_of_readme(path):
    """Return the README's Python and its lines of `lora-da` as steps."""
    text = path.read_text(encoding="utf-8")
    steps = []
    for code, lines in re.findall(r"(?s:```python\n(.*?)```)|((?:^    lora-da .*\n)+)", text, re.MULTILINE):
        steps += [("python", code)] if code else commands(textwrap.dedent(lines))
    return steps


def commands(text):
    """Return the lines of a shell as steps."""
    steps = []
    for line in text.replace("\\\n", " ").strip().splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "lora-da", line
        steps.append(("lora-da", words))
    return steps


def cells_of_notebook(path, parameters):
    """Return the code cells of a notebook as steps, with other values behind the cell of parameters."""
    steps = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code" or cell["metadata"].get("tags") == ["install"]:
            continue
        text = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            unknown = [name for name in parameters if not re.search(rf"^{name} = ", text, re.MULTILINE)]
            assert not unknown, f"{path.name} has no parameters {unknown}"
            text += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        steps.append(("python", text))
    return steps


def serve_what_the_readme_names(hub, folder):
    """Put models and data sets of these names on a Hub: a small random model, sums and chats."""
    chats = [[{"role": "user", "content": f"{k} ="}, {"role": "assistant", "content": f"{k}."}] for k in range(64)]
    lines = write_sums(folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sums = [json.loads(line) for line in lines]
    rows = {
        ("openai/gsm8k", "main"): [{"question": row["prompt"], "answer": row["completion"]} for row in sums],
        ("trl-lib/Capybara", "default"): [{"messages": chat} for chat in chats],
    }
    for (name, config), data in rows.items():
        card = f"---\nconfigs: [{{config_name: {config}, data_files: [{{split: train, path: rows.jsonl}}]}}]\n---\n"
        lines = "\n".join(map(json.dumps, data))
        hub.serve(f"datasets/{name}", {"README.md": card.encode(), "rows.jsonl": lines.encode()})
    model = make_model_folder(folder / "chat", with_chat_template=True)
    hub.serve("HuggingFaceTB/SmolLM2-135M-Instruct", {path.name: path.read_bytes() for path in model.iterdir()})


def run_steps(steps, folder, *, replace=None, environment=None, python=None):
    """Run steps in one new process in a folder, and return what it wrote to stdout.

    Args:
        steps: Pairs of ``"python"`` and code, or ``"lora-da"`` and its arguments.
        folder: Where.
        replace: Texts to put something else in the place of.
        environment: Additional environment variables.
        python: The interpreter of another environment, which has the package; None: this one, with the checkout.
    """
    changed = []
    for kind, content in steps:
        text = content if kind == "python" else json.dumps(content)
        for old, new in (replace or {}).items():
            text = text.replace(old, new)
        changed.append((kind, text))
    path = "" if python else os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [python or sys.executable, "-c", RUNNER],
        input=json.dumps(changed),
        cwd=folder,
        env={
            **os.environ,
            **{"PYTHONPATH": path, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"},
            **(environment or {"HF_HUB_OFFLINE": "1"}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout
