"""scripts/run_clm.py, run in this process on a tiny random model."""

import gzip
import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import run_clm

from lora_da_hf import LoRADAError
from lora_da_hf.training.text import _of_chat, _of_pair
from lora_da_hf.training.text import load_file as load_rows

# The csv reader of datasets 4.0 leaves its file to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. .*FileIO.*csv:pytest.PytestUnraisableExceptionWarning"
)

WORDS = [f"w{i}" for i in range(40)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "user", "assistant", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def sentence(i, length=12):
    return " ".join(WORDS[(i * 7 + j * (i % 3 + 1)) % len(WORDS)] for j in range(length))


TEXTS = [sentence(i) for i in range(40)]
PAIRS = [{"question": sentence(i, 4 + i % 3), "answer": sentence(i + 1, 3 + i % 4)} for i in range(24)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


PAIR_FLAGS = ["--prompt_column", "question", "--completion_column", "answer"]


def flags(model_dir, out, *more, init="lora", steps=3):
    shared = ["--model_name_or_path", model_dir, "--output_dir", out, "--init", init, "--use_cpu"]
    budget = ["--max_steps", steps, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--lora_rank", 2]
    quiet = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--da_num_samples", 16]
    small = ["--da_search_samples", 2]
    return [str(flag) for flag in [*shared, *budget, *quiet, *small, *more]]


def losses(out):
    return [entry["loss"] for entry in state(out)["log_history"] if "loss" in entry]


def state(out):
    return json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))


@pytest.fixture
def samples(monkeypatch):
    """Datasets that the script hands to the trainer, by split."""
    seen = {}
    make_trainer = run_clm.make_trainer

    def record(model, tokenizer, samples, arguments):
        seen.update(samples)
        return make_trainer(model, tokenizer, samples, arguments)

    monkeypatch.setattr(run_clm, "make_trainer", record)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """Input ids of every training step."""
    seen = []
    training_step = Trainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", record)
    return seen


# ------------------------------------------------------------------------------------------------ plain text


def write_texts(path):
    rows = Dataset.from_list([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    if path.suffix == ".txt":
        path.write_text("\n".join(TEXTS), encoding="utf-8")
    else:
        {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(path.suffix, rows.to_json)(path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".parquet"])
def test_plain_text_is_joined_and_cut_into_blocks(model_dir, tmp_path, samples, suffix):
    train_file = write_texts(tmp_path / f"text{suffix}")
    run_clm.main(flags(model_dir, tmp_path / "out", "--train_file", train_file, "--block_size", 8, "--do_train"))
    tokenizer = make_tokenizer()
    tokens = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    blocks = [tokens[i : i + 8] for i in range(0, len(tokens) - 7, 8)]
    assert samples["train"]["input_ids"][:] == blocks
    assert samples["train"]["labels"][:] == blocks
    assert samples["train"].column_names == ["input_ids", "attention_mask", "labels"]


def test_a_dataset_by_its_name(model_dir, tmp_path, samples):
    folder = tmp_path / "dataset"  # what load_dataset takes in place of a name on the Hub
    folder.mkdir()
    write_texts(folder / "train.jsonl")
    write_jsonl(folder / "validation.jsonl", [{"text": text} for text in TEXTS[:20]])
    arguments = ["--dataset_name", folder, "--block_size", 8, "--do_train", "--do_eval"]
    metrics = run_clm.main(flags(model_dir, tmp_path / "out", *arguments, init="lora_da"))
    tokenizer = make_tokenizer()
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:20])):
        tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
        assert samples[split]["input_ids"][:] == [tokens[i : i + 8] for i in range(0, len(tokens) - 7, 8)]
    assert metrics["eval_loss"] > 0


def test_block_size_is_the_models_limit_at_most(model_dir, tmp_path, samples, caplog):
    train_file = write_texts(tmp_path / "text.txt")
    arguments = flags(model_dir, tmp_path / "out", "--train_file", train_file, "--do_train", steps=1)
    run_clm.main(arguments)
    assert len(samples["train"][0]["input_ids"]) == 64
    run_clm.main([*arguments, "--block_size", "100"])
    assert len(samples["train"][0]["input_ids"]) == 64
    assert "more than the model takes" in caplog.text


def test_streaming(model_dir, tmp_path):
    train_file = write_texts(tmp_path / "text.txt")
    validation_file = write_texts(tmp_path / "validation.jsonl")
    more = ["--train_file", train_file, "--validation_file", validation_file, "--streaming", "--block_size", 8]
    metrics = run_clm.main(flags(model_dir, tmp_path / "out", *more, "--do_train", "--do_eval"))
    assert len(losses(tmp_path / "out")) == 3
    assert metrics["eval_loss"] > 0


# --------------------------------------------------------------------------------------- prompt and completion


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_completion_has_labels(model_dir, tmp_path, samples, pairs_file, chat):
    more = ["--train_file", pairs_file, *PAIR_FLAGS, "--do_train", "--use_chat_template", chat]
    run_clm.main(flags(model_dir, tmp_path / "out", *more))
    ids = make_tokenizer().convert_tokens_to_ids
    before, behind = (["user"], ["</s>", "assistant"]) if chat else (["<s>"], [])
    for sample, row in zip(samples["train"], PAIRS, strict=True):
        prompt, completion = ids([*before, *row["question"].split(), *behind]), ids([*row["answer"].split(), "</s>"])
        assert sample["input_ids"] == prompt + completion
        assert sample["attention_mask"] == [1] * len(prompt + completion)
        assert sample["labels"] == [-100] * len(prompt) + completion


def test_of_a_chat_the_turns_of_the_assistant_have_labels(model_dir, tmp_path, samples):
    chats = [
        [{"role": role, "content": sentence(10 * k + turn, 2)} for turn, role in enumerate(roles)]
        for k, roles in enumerate([("system", "user", "assistant", "user", "assistant", "user"), ("user", "assistant")])
    ]
    train_file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in [*chats, chats[0][:2]]])
    more = ["--train_file", train_file, "--messages_column", "messages", "--do_train"]
    run_clm.main(flags(model_dir, tmp_path / "out", *more))
    ids = make_tokenizer().convert_tokens_to_ids
    assert len(samples["train"]) == 2  # the third has no turn of the assistant
    for sample, chat in zip(samples["train"], chats, strict=True):
        last = max(place for place, turn in enumerate(chat) if turn["role"] == "assistant")
        words = [(turn["role"], [*turn["content"].split(), "</s>"]) for turn in chat[: last + 1]]
        assert sample["input_ids"] == ids([word for role, said in words for word in (role, *said)])
        labels = [
            label for role, said in words for label in (-100, *(ids(said) if role == "assistant" else [-100] * 3))
        ]
        assert sample["labels"] == labels


def test_several_files_are_joined_or_drawn_by_weight(model_dir, tmp_path, samples):
    files = [write_jsonl(tmp_path / f"{k}.jsonl", PAIRS[8 * k : 8 * k + 8]) for k in range(2)]
    more = [*PAIR_FLAGS, "--do_train", "--train_file", *files]
    run_clm.main(flags(model_dir, tmp_path / "out", *more))
    assert len(samples["train"]) == 16
    run_clm.main(flags(model_dir, tmp_path / "out", *more, "--data_weights", 4, 1))
    drawn = [tuple(sample["input_ids"]) for sample in samples["train"]]
    assert len(set(drawn)) == len(drawn)  # a row that comes twice could be held out and trained on
    assert 8 <= len(drawn) < 16
    with pytest.raises(LoRADAError, match="one for each"):
        run_clm.main(flags(model_dir, tmp_path / "out", *more, "--data_weights", 4))
    write_jsonl(files[1], [{"question": "w1", "reply": "w2"}])
    with pytest.raises(LoRADAError, match=r"1\.jsonl data has no column 'answer'"):
        run_clm.main(flags(model_dir, tmp_path / "out", *more))


def test_words_that_pandas_takes_for_empty_cells_are_text(tmp_path):
    (tmp_path / "a[1].csv").write_text("text,other\nNone,1\nNA,2\n,3\n")
    assert load_rows(str(tmp_path / "a[1].csv"))["text"][:] == ["None", "NA", None]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a\n", "b", [[2, 3, 5], [4], [1]]),
        ("a ", "b", [[2, 3, 2], [4], [1]]),  # both together would be "▁b", and "b" alone, too
        ("a", " b", [[2, 3], [6], [1]]),
        ("a\n", "b</s>", [[2, 3, 5], [4, 1], []]),
    ],
)
def test_a_completion_is_encoded_behind_its_prompt_and_not_as_if_a_text_began(prompt, completion, expected):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "\n": 5, "▁b": 6}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    parts = _of_pair(prompt, completion, tokenizer)
    assert [ids for ids, _ in parts] == expected
    assert [counts for _, counts in parts] == [False, True, True]


def test_keys_that_a_table_fills_into_a_tool_call_are_left_out():
    calls = [{"function": {"name": "weather", "arguments": {"city": "w1", "expression": None}}}]
    turns = [{"role": "user", "content": "w2"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} "
        "{% for c in m.tool_calls %}{{ c.function.arguments.values() | join(' ') }}{% endfor %}{% endfor %}"
    )
    assert [tokenizer.decode(ids) for ids, _ in _of_chat(turns, tokenizer)] == ["w2", "w1"]


def test_pairs_are_cut_and_rows_without_a_label_are_left_out(model_dir, tmp_path, samples, caplog):
    rows = [
        {"question": "w1 w2", "answer": "w3 w4 w5 w6"},
        {"question": "w1 " * 9, "answer": "w2"},
        {"question": "w1", "answer": None},
        {"question": None, "answer": "w3"},
    ]
    train_file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    more = ["--train_file", train_file, *PAIR_FLAGS, "--block_size", 5, "--do_train"]
    run_clm.main(flags(model_dir, tmp_path / "out", *more))
    ids = make_tokenizer().convert_tokens_to_ids(["w1", "w2", "w3", "w4"])
    assert samples["train"]["input_ids"][:] == [[1, *ids], [1, ids[2], 2]]
    assert samples["train"]["labels"][:] == [[-100, -100, -100, *ids[2:]], [-100, ids[2], 2]]
    assert "Left out: 2 of 4 train rows" in caplog.text
    assert "Cut: 1 of 4 train rows" in caplog.text


# ----------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("init", ["lora", "lora_da"])
def test_files_of_a_run(model_dir, tmp_path, pairs_file, init):
    out = tmp_path / "out"
    more = ["--train_file", pairs_file, *PAIR_FLAGS, "--do_train", "--do_eval", "--eval_on_start"]
    metrics = run_clm.main(flags(model_dir, out, *more, init=init))
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)
    assert metrics["eval_samples"] == 1
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    assert json.loads((out / "train_results.json").read_text())["train_samples"] == len(PAIRS) - 1
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(losses(out)) == 3
    assert next(entry["step"] for entry in state(out)["log_history"] if "eval_loss" in entry) == 0
    base = LlamaForCausalLM.from_pretrained(model_dir)
    adapter = PeftModel.from_pretrained(base, out)
    assert all(torch.isfinite(parameter).all() for parameter in adapter.parameters())
    assert (out / "lora_da" / "lora_da_manifest.json").is_file() == (init == "lora_da")


def test_a_run_starts_from_the_initialisation_of_another(model_dir, tmp_path, pairs_file):
    shared = ["--train_file", pairs_file, *PAIR_FLAGS, "--do_train", "--learning_rate", 0.0]
    run_clm.main(flags(model_dir, tmp_path / "first", *shared, "--da_step_size", 0.1, init="lora_da"))
    stored = ["--init_from", tmp_path / "first" / "lora_da"]
    run_clm.main(flags(model_dir, tmp_path / "second", *shared, *stored, init="lora_da"))
    weights = [load_file(tmp_path / which / "adapter_model.safetensors") for which in ("first", "second")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-6, atol=1e-9)
        assert weight.any()
    report = json.loads((tmp_path / "second" / "lora_da_init_from.json").read_text(encoding="utf-8"))
    assert report["init_from"].startswith("sha256:")


def test_both_inits_see_the_same_batches_and_validation_rows(model_dir, tmp_path, pairs_file, batches, samples):
    seen, validation = {}, {}
    more = ["--train_file", pairs_file, *PAIR_FLAGS, "--do_train", "--do_eval", "--lora_dropout", 0.1]
    for init in ("lora", "lora_da"):
        run_clm.main(flags(model_dir, tmp_path / init, *more, init=init, steps=14))
        seen[init], validation[init] = list(batches), samples["validation"]["input_ids"][:]
        batches.clear()
    assert len(seen["lora"]) == 14
    assert any(first != second for first, second in pairwise(seen["lora"]))
    assert seen["lora"] == seen["lora_da"]
    assert validation["lora"] == validation["lora_da"]


@pytest.mark.parametrize("init", ["lora", "lora_da"])
def test_resumed_run_ends_like_an_uninterrupted_one(model_dir, tmp_path, pairs_file, init):
    more = ["--train_file", pairs_file, *PAIR_FLAGS, "--do_train", "--lora_dropout", 0.1]
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    out = tmp_path / "out"
    run_clm.main(flags(model_dir, out, *more, *saving, init=init, steps=4))
    whole = losses(out)
    run_clm.main(flags(model_dir, out, *more, "--resume_from_checkpoint", out / "checkpoint-2", init=init, steps=4))
    assert losses(out) == pytest.approx(whole, rel=1e-5)
    run_clm.main(flags(model_dir, out, *more, "--resume_from_checkpoint", "last", init=init, steps=6))
    assert losses(out)[:4] == pytest.approx(whole, rel=1e-5)
    assert len(losses(out)) == 6


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(("suffix", "form"), [(".json", "alone"), (".yaml", "with flags")])
def test_config_file(model_dir, tmp_path, suffix, form, pairs_file):
    settings = {
        "model_name_or_path": str(model_dir),
        "output_dir": str(tmp_path / "out"),
        "train_file": str(pairs_file),
        "prompt_column": "question",
        "completion_column": "answer",
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": "1e-3",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "max_eval_samples": None,
        "use_rslora": True,
        "do_train": True,
        "use_cpu": True,
        "da_num_samples": 5,
        "da_step_size": 0.25,
    }
    path = tmp_path / f"settings{suffix}"
    path.write_text(json.dumps(settings) if suffix == ".json" else yaml.safe_dump(settings), encoding="utf-8")
    argv = [str(path)] if form == "alone" else ["--init", "lora", "--config", str(path), "--learning_rate", "2e-3"]
    arguments = run_clm.parse_arguments(argv)
    assert arguments.training.learning_rate == (1e-3 if form == "alone" else 2e-3)
    assert arguments.adapter.init == ("lora_da" if form == "alone" else "lora")
    assert arguments.adapter.to_peft().target_modules == {"q_proj", "v_proj"}
    assert arguments.adapter.use_rslora
    assert arguments.training.do_train
    assert arguments.training.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert arguments.data.max_eval_samples is None
    assert (arguments.da.to_config().num_samples, arguments.da.to_config().step_size) == (5, 0.25)


def fails(capsys, argv):
    with pytest.raises(SystemExit) as exit_info:
        run_clm.main([str(flag) for flag in argv])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


MODEL = ["--model_name_or_path", "m", "--output_dir", "out"]
DATA = ["--do_train", "--dataset_name", "d"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to do"),
        (["--do_train"], "--do_train needs data"),
        ([*DATA, "--train_file", "a.csv"], "not both"),
        ([*DATA, "--use_chat_template"], "--prompt_column"),
        ([*DATA, "--streaming"], "--max_steps"),
        ([*DATA, "--lora_rnak", "2"], "Do you mean 'lora_rank'?"),
        ([*DATA, "--da_num_samples", "0"], "num_samples"),
        ([*DATA, "--init", "lora", "--init_from", "x"], "--init_from"),
        (["--do_eval", "--dataset_name", "d", "--init_from", "x"], "without --do_train"),
        ([*DATA, "--search_step"], "--search_step needs --init_from"),
        ([*DATA, "--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_wrong_flags(capsys, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, [*MODEL, *more])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"lerning_rate": 1}', "unknown setting 'lerning_rate'. Do you mean 'learning_rate'?"),
        ('{"learning_rate": "fast"}', "invalid float value"),
        ('{"init": "pissa"}', "init must be one of lora_da, lora"),
    ],
)
def test_wrong_config_file(capsys, tmp_path, text, message):
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    assert message in fails(capsys, [path])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text_column", "body"], "no column 'body', only 'question', 'answer'"),
        (["--text_column", "answer", "--block_size", "64", "--do_eval"], "--block_size 64. Lower it"),
        ([*PAIR_FLAGS, "--block_size", "3"], "--block_size 3. Raise it"),
        ([*PAIR_FLAGS, "--streaming", "--do_eval"], "give --validation_file"),
        ([*PAIR_FLAGS, "--target_modules", "nope"], "'nope'"),
        ([*PAIR_FLAGS, "--target_modules", "q_proj", "nope"], "no layer nope"),
    ],
)
def test_data_that_does_not_fit(model_dir, tmp_path, pairs_file, more, message):
    with pytest.raises(LoRADAError, match=message):
        run_clm.main(flags(model_dir, tmp_path / "out", "--train_file", pairs_file, *more, "--do_train"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".JSONL", ".jsonl.gz", ".Txt.GZ"])
def test_suffixes_in_upper_case_and_of_compressed_files(tmp_path, suffix, streaming):
    plain = write_texts(tmp_path / f"plain{suffix.lower().removesuffix('.gz')}").read_bytes()
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(plain) if suffix.lower().endswith(".gz") else plain)
    rows = load_rows(str(path), streaming=streaming)
    assert [row["text"].strip() for row in rows] == TEXTS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset_name", "org/data"], "org/data cannot be loaded as data"),
        (["--train_file", "missing.csv"], "missing.csv cannot be loaded as data"),
        (["--train_file", "pairs.jsonl", "--output_dir", "pairs.jsonl/out"], "pairs.jsonl/out cannot be written"),
    ],
)
def test_what_does_not_exist_is_said_without_a_traceback(model_dir, tmp_path, pairs_file, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    words = flags(model_dir, tmp_path / "out", *more, *PAIR_FLAGS, "--do_train")
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(run_clm.__file__, run_name="__main__")
    assert left.value.code.startswith("run_clm.py: error: ")
    assert message in left.value.code
    assert "\n" not in left.value.code


@pytest.mark.parametrize("value", [1, [{"role": "user", "content": "Hello"}]], ids=["a number", "a chat"])
def test_columns_that_are_not_text(model_dir, tmp_path, value):
    train_file = write_jsonl(tmp_path / "numbers.jsonl", [{"text": value}, {"text": value}])
    with pytest.raises(LoRADAError, match="'text' must hold text"):
        run_clm.main(flags(model_dir, tmp_path / "out", "--train_file", train_file, "--do_train"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["another"]), "use the tokenizer that belongs to the model"),
        (lambda tokenizer: setattr(tokenizer, "chat_template", None), "no chat template"),
    ],
)
def test_a_tokenizer_that_does_not_fit(model_dir, tmp_path, pairs_file, change, message):
    tokenizer = make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = ["--tokenizer_name", tmp_path / "tokenizer", *PAIR_FLAGS, "--use_chat_template", "--do_train"]
    with pytest.raises(LoRADAError, match=message):
        run_clm.main(flags(model_dir, tmp_path / "out", "--train_file", pairs_file, *more))
