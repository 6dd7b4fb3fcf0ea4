"""What each verb does: on a small model where it computes, with the functions replaced where it only calls one."""

import dataclasses
import io
import json
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from harness import forge_manifest
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    ViTConfig,
    ViTForImageClassification,
)
from walkthrough import write_sums

from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.cli.flags import base_model_of_folder
from lora_da_hf.cli.main import VERBS, make_parser
from lora_da_hf.cli.output import Output
from lora_da_hf.hub.cards import render_card
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.setting_groups import FREE_IN_REFIT
from lora_da_hf.training.arguments import LoraArguments

PAIRS = ["--prompt_column", "prompt", "--completion_column", "completion"]
SMALL = ["--block_size", 32, "--lora_rank", 2, "--da_num_samples", 12, "--da_search_samples", 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def stored(place, cache):
    """Return the folder of an initialisation that `lora-da init` wrote."""
    from lora_da_hf.cli.main import main

    words = ["init", place / "model", place / "train.jsonl", place / "an-init", *PAIRS, *SMALL, "--da_max_rank", 4]
    assert main([str(word) for word in [*words, "--quiet"]]) == 0
    return place / "an-init"


# ------------------------------------------------------------------------------------------------------------ init


def test_init_stores_what_the_flags_say(stored):
    manifest = load_init(stored).manifest
    assert {layer.rank for layer in manifest.layers.values()} == {2}
    assert {layer.max_rank for layer in manifest.layers.values()} == {4}
    assert manifest.report.num_samples == 12
    assert len(manifest.layers) == 14


def test_init_prints_the_folder_and_the_losses(lora_da, place, cache, tmp_path):
    words = [place / "model", place / "train.jsonl", tmp_path / "out", *PAIRS, *SMALL, "--da_seed", 7, "--json"]
    code, out, err = lora_da("init", *words, "--target_modules", "q_proj", "v_proj")
    facts = json.loads(out)
    assert code == 0, err
    assert facts["folder"] == str(tmp_path / "out")
    assert facts["layers"] == 4
    assert facts["unseen_loss_after"] > 0
    assert load_init(tmp_path / "out").report.seed == 7
    assert "%|" not in err  # no progress bar where nobody watches


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"notes.txt": "mine"}, [], "holds something else"),
        ({"lora_da_manifest.json": "{}"}, [], "give --overwrite"),
        ({"lora_da_manifest.json": "{}", "thesis.tex": "mine"}, ["--overwrite"], "holds something else than an init"),
    ],
)
def test_init_replaces_nothing_by_accident(lora_da, place, tmp_path, content, flags, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    code, _, err = lora_da("init", place / "model", place / "train.jsonl", tmp_path, *PAIRS, *SMALL, *flags)
    assert code == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == set(content)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["train.jsonl", "--prompt_column", "prompt"], "--completion_column is missing"),
        (["train.jsonl", "--da_num_samples", "0"], "num_samples=0 must be at least 1"),
        (["train.jsonl", "--text_column", "nothing"], "has no column 'nothing'"),
        (["train.jsonl", "--split", "train[:3]"], "--split is for a data set on the Hub, and train.jsonl is a file"),
        (["train.jsonl", "--dataset_config_name", "main"], "--dataset_config_name is for a data set on the Hub"),
        (["train.jsonl", *PAIRS, "--target_modules", "nope"], "--target_modules: Target modules {'nope'} not found"),
        (["train.jsonl", "--target_modules", "all-linear", "q_proj"], "all-linear stands for all linear layers but"),
        (["train.jsonl", "--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
        (["train.jsonl", "--lora_alpha", "0"], "--lora_alpha must be at least 1, got 0"),
        (["train.jsonl", "--lora_dropout", "2"], "--lora_dropout must be at least 0 and below 1, got 2"),
        (["empty.jsonl"], "empty.jsonl holds no rows"),
        (["blank.jsonl"], "blank.jsonl holds no rows"),
        (["notes.md"], "notes.md: the name must end in one of .csv, .json, .jsonl, .txt, .parquet, .csv.gz"),
        (["missing.JSONL.gz"], "missing.JSONL.gz does not exist"),
        (["bare"], "bare holds a model and no data, as its config.json tells"),
        (["folder"], "folder cannot be loaded as a data set"),
        (["mixed"], "mixed cannot be loaded as a data set: its files have different columns. Give a folder with"),
        (["broken.parquet"], "broken.parquet cannot be read as parquet data"),
        (["train.jsonl", *PAIRS, "--tokenizer_name", "bare"], "Name one with --tokenizer_name, or do what it says"),
    ],
)
def test_init_says_what_is_wrong_with_its_input(lora_da, place, cache, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "train.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "mixed").mkdir()
    for column in ("a", "b"):
        (tmp_path / "mixed" / f"{column}.jsonl").write_text(json.dumps({column: "text"}))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    shutil.copytree(place / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    data, *flags = words
    code, out, err = lora_da("init", place / "model", data, "out", *flags)
    assert (code, out) == (1, "")
    assert message in err
    assert "Hint: " not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("no/such/model", "train.jsonl", "no/such/model is no folder that exists, and no name that the Hub allows"),
        ("folder", "train.jsonl", "folder is a folder without a config.json, so no model"),
        ("train.jsonl", "train.jsonl", "train.jsonl is a file, no model"),
        ("train.jsonl", "folder", "MODEL comes before DATA. Give the two the other way round"),
        ("org/model", "train.jsonl", "The model org/model cannot be loaded: "),
        ("folder", "org/data", "org/data cannot be loaded as a data set: "),
    ],
)
def test_init_of_a_model_or_data_that_are_not_there(lora_da, place, cache, tmp_path, monkeypatch, model, data, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    shutil.copy(place / "train.jsonl", tmp_path)
    (tmp_path / "folder").mkdir()
    code, _, err = lora_da("init", model, data, "out", *PAIRS)
    assert code == 1
    assert message in err
    assert "Hint: " not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], " has the columns 'prompt', 'completion', and none called 'text'. Say what to train on: pairs with "),
        (["--text_column", "completion"], ": column 'completion' is read as plain text (left out: 'prompt').\n"),
        (PAIRS, ": column 'prompt' is the prompt, 'completion' the completion.\n"),
    ],
)
def test_init_says_which_columns_are_used(lora_da, place, cache, tmp_path, flags, message):
    words = [place / "model", place / "train.jsonl", tmp_path / "out", *flags, "--block_size", 32]
    code, _, err = lora_da("init", *words, "--target_modules", "nope")
    assert code == 1
    assert f"The training data{message}" in err


# ------------------------------------------------------------------------------------------------------------ plan


def test_plan_says_before_what_init_says_then(lora_da, stored, place):
    code, out, err = lora_da("plan", place / "model", "--lora_rank", 2, "--da_num_samples", 12, "--tokens", 32)
    assert code == 0, err
    assert out.split("; about")[0] == load_init(stored).report.plan.split("; about")[0]
    assert "at this machine's speed; besides, " in out


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's own of experts
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", [GPT2Config, MixtralConfig, Qwen3MoeConfig, GptOssConfig])
def test_plan_of_other_families_is_that_of_init(lora_da, place, tmp_path, kind):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3}
    mixture = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = kind(**size, **({} if kind is GPT2Config else mixture))
    config.save_pretrained(tmp_path)
    code, out, err = lora_da("plan", tmp_path, "--lora_rank", 2, "--da_num_samples", 4, "--tokens", 12)
    assert code == 0, err
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraArguments(lora_rank=2).to_peft())
    samples = [{"input_ids": (ids := torch.arange(k, k + 12).tolist()), "labels": ids} for k in range(8)]
    report = initialize_lora_da(model, samples, config=LoRADAConfig(num_samples=4, search_samples=2), progress=False)
    assert out.split("; about")[0] == report.plan.split("; about")[0]


def test_plan_counts_the_passes_that_draw_labels(lora_da, place, monkeypatch):
    monkeypatch.setattr("lora_da_hf.cli.planning.measure_speed", lambda dtype: 1e6)
    flags = [[], ["--da_fisher", "sampled"]]
    empirical, sampled = (json.loads(lora_da("plan", place / "model", "--json", *more)[1]) for more in flags)
    assert sampled["statistics_seconds"] > 1.5 * empirical["statistics_seconds"]


def test_plan_takes_as_much_memory_as_init_would(lora_da, place, monkeypatch):
    monkeypatch.setattr("lora_da_hf.pipeline.memory.free_memory", lambda device: 300 * 1024)
    code, out, err = lora_da("plan", place / "model", "--da_schedule", "samples", "--json")
    assert code == 0, err
    assert json.loads(out)["passes"] > 1
    assert json.loads(out)["peak_bytes"] <= 200 * 1024


def test_plan_reads_a_config_alone_and_keeps_to_a_budget(lora_da, place, tmp_path):
    shutil.copy(place / "model" / "config.json", tmp_path)
    words = ["--world_size", 3, "--da_memory_budget", "200KiB", "--da_num_samples", 5, "--tokens", 100, "--json"]
    code, out, err = lora_da("plan", tmp_path, *words, "--da_schedule", "samples")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["schedule"], facts["processes"]) == ("samples", 3)
    assert facts["passes"] > 1
    assert facts["sample_passes"] == 2 * facts["passes"]
    assert facts["sent_bytes"] > 0
    assert facts["peak_bytes"] <= 200 * 1024
    adapter = 8 * 2 * (4 * 32 + 32 + 16 + 16 + 32 + 3 * (32 + 48))  # rank 8, two blocks
    base = sum(tensor.numel() for tensor in load_file(place / "model" / "model.safetensors").values())
    assert facts["weight_bytes"] == 4 * (base + adapter)
    assert lora_da("plan", tmp_path, "--quiet")[1].strip().isdigit()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--da_memory_budget", "1KiB"], "The statistics do not fit: "),
        (["--da_memory_budget", "lots"], "memory_budget='lots' is no amount of memory"),
        (
            ["--target_modules", "embed_tokens"],
            "None of the 1 LoRA layers can be initialised. model.embed_tokens: Embedding is not a linear",
        ),
        (
            ["--lora_rank", "999"],
            "LoRA layers can be initialised. model.layers.0.self_attn.q_proj: rank 999 is above its input size 32; ",
        ),
        (["--target_modules", "all-linear", "q_proj"], "all-linear stands for all linear layers but the output head"),
        (["--lora_dropout", "-1"], "--lora_dropout must be at least 0 and below 1, got -1"),
    ],
)
def test_plan_says_what_cannot_be(lora_da, place, words, message):
    code, out, err = lora_da("plan", place / "model", *words)
    assert (code, out) == (1, "")
    assert message in err


def test_plan_counts_the_layers_that_keep_their_initialisation(lora_da, place):
    code, out, err = lora_da("plan", place / "model", "--lora_rank", 40)
    assert code == 0, err
    kept = "12 of 14 layers keep PEFT's own initialisation: rank 40 is above its input size 32 (12 layers)"
    assert out.splitlines()[1] == kept
    facts = json.loads(lora_da("plan", place / "model", "--lora_rank", 40, "--json")[1])
    assert (facts["layers"], facts["kept"]) == (2, 12)
    words = ["--target_modules", "q_proj", "embed_tokens"]
    assert "1 of 3 layers keep" in lora_da("plan", place / "model", *words)[1]


# --------------------------------------------------------------------------------------------- show, verify, card


def test_show_prints_a_table(lora_da, stored):
    code, out, err = lora_da("show", stored)
    assert (code, err) == (0, "")
    assert "LoRA-DA initialisation" in out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "2 of 4 stored" in out


def test_show_as_json_and_bare(lora_da, stored):
    facts = json.loads(lora_da("show", stored, "--json")[1])
    assert facts["ranks"] == [2]
    assert facts["modules"]["q_proj"] == 2
    assert len(facts["layers"]) == 14
    names = lora_da("show", stored, "--quiet")[1].split()
    assert names == [layer["name"] for layer in facts["layers"]]


def test_show_draws_plots(lora_da, stored, tmp_path):
    facts = json.loads(lora_da("show", stored, "--plots", tmp_path / "plots", "--json")[1])
    assert facts["plots"] == [str(tmp_path / "plots" / name) for name in ("guidance_spectra.png", "step_search.png")]
    assert all((tmp_path / "plots" / name).stat().st_size > 10_000 for name in ("guidance_spectra.png",))


def test_verify_accepts_what_was_written(lora_da, stored):
    code, out, _ = lora_da("verify", stored)
    assert code == 0
    assert out.startswith("OK: 4 files")
    assert lora_da("verify", stored, "--quiet")[:2] == (0, "ok\n")


def test_verify_finds_a_flipped_bit(lora_da, stored, tmp_path):
    copy = shutil.copytree(stored, tmp_path / "copy")
    path = copy / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, err = lora_da("verify", copy)
    assert (code, out) == (1, "")
    assert "another SHA-256" in err


def test_verify_compares_the_base_model(lora_da, stored, place, tmp_path, tiny_llama):
    code, out, _ = lora_da("verify", stored, "--base_model", place / "model", "--json")
    assert code == 0
    assert json.loads(out)["base_model_checked"] is True
    tiny_llama().save_pretrained(tmp_path / "other")
    code, _, err = lora_da("verify", stored, "--base_model", tmp_path / "other")
    assert code == 1
    assert "the model differs" in err


def test_the_base_model_is_loaded_as_it_was_for_the_initialisation(lora_da, monkeypatch, stored, place):
    from transformers import AutoModelForCausalLM

    load, given = AutoModelForCausalLM.from_pretrained, []

    def noted(*args, **kwargs):
        given.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    code, _, _ = lora_da("verify", stored, "--base_model", place / "model", "--dtype", "float32", "--trust_remote_code")
    assert code == 0
    assert given == [{"revision": "main", "dtype": "float32", "trust_remote_code": True}]


@pytest.mark.parametrize("flag", [["--model_revision", "v1"], ["--dtype", "float16"], ["--trust_remote_code"]])
@pytest.mark.parametrize("verb", ["verify", "refit", "pull"])
def test_flags_of_a_base_model_that_is_not_named_are_refused(lora_da, stored, tmp_path, verb, flag):
    words = {"verify": [stored], "refit": [stored, tmp_path / "new"], "pull": ["user/name"]}[verb]
    code, _, err = lora_da(verb, *words, *flag)
    assert code == 1
    assert f"{flag[0]} is of the base model, and --base_model names none" in err


@pytest.mark.parametrize("verb", ["verify", "refit"])
def test_what_is_no_initialisation_is_said_before_a_base_model_is_loaded(lora_da, place, tmp_path, verb):
    for folder in (tmp_path / "nowhere", place / "model"):
        words = [folder, *([tmp_path / "new"] if verb == "refit" else []), "--base_model", place / "model"]
        code, _, err = lora_da(verb, *words)
        assert code == 1
        assert "lora_da_manifest.json does not exist: this is not a LoRA-DA initialisation" in err
        assert "Loading" not in err


def test_the_base_model_is_loaded_for_the_stored_task(monkeypatch, stored, tmp_path):
    import transformers

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    folder = shutil.copytree(stored, tmp_path / "init")

    loaded = []
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        load = SimpleNamespace(from_pretrained=lambda *_, name=name, **__: loaded.append(name))
        monkeypatch.setattr(transformers, name, load)
    verb = next(verb for verb in VERBS if verb.name == "verify")
    arguments = make_parser(verb).parse_args(["verify", str(folder), "--base_model", str(tmp_path / "base")])
    for task_type, noted in (
        ("SEQ_CLS", None),
        ("CAUSAL_LM", "ViTModel"),
        (None, None),
        (None, "Trainer"),
        (None, "x"),
    ):
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"task_type": task_type, "auto_mapping": None if noted is None else {"base_model_class": noted}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        forge_manifest(folder)
        base_model_of_folder(arguments, Output(quiet=True))
    assert loaded == ["AutoModelForSequenceClassification", *["AutoModelForCausalLM"] * 4]


def test_without_a_task_the_base_is_loaded_by_the_class_that_peft_noted(lora_da, tmp_path, lora_model):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8)
    config.patch_size, config.num_labels = 4, 3
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": k % 3} for k in range(16)]
    initialize_lora_da(
        lora_model(model=base, target_modules=["fc1"]),
        images,
        config=LoRADAConfig(num_samples=8, search_samples=2, step_size=0.1),
        data_collator=lambda rows: {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]
        },
        output_dir=tmp_path / "init",
        progress=False,
    )
    code, out, err = lora_da("verify", tmp_path / "init", "--base_model", tmp_path / "base", "--json")
    assert code == 0, err
    assert json.loads(out)["base_model_checked"] is True


def test_card_goes_to_stdout(lora_da, stored):
    words = ["--license", "mit", "--datasets", "gsm8k", "two words", "--language", "en", "--hardware", "two cores"]
    code, out, err = lora_da("card", stored, *words, "--base_model", "org/model")
    assert (code, err) == (0, "")
    arguments = {"datasets": ["gsm8k", "two words"], "language": ["en"], "hardware": "two cores"}
    assert out == render_card(load_init(stored), license="mit", base_model="org/model", **arguments)


def test_what_is_redirected_is_utf8_on_every_system(stored, monkeypatch):
    from lora_da_hf.cli.main import main

    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["card", str(stored), "--datasets", "データ集"]) == 0
    stream.flush()
    assert "データ集" in file.getvalue().decode("utf-8")


def test_card_holds_no_text_of_the_data(lora_da, place, cache, tmp_path):
    rows = [{"prompt": f"xyzzy{k} plugh", "completion": f" frotz{k}"} for k in range(40)]
    data = tmp_path / "secret-name.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lora_da("init", place / "model", data, tmp_path / "init", *PAIRS, *SMALL)
    _, out, _ = lora_da("card", tmp_path / "init")
    texts = [out, *(p.read_bytes().decode("latin-1") for p in (tmp_path / "init").iterdir())]
    assert not any(word in text for word in ("xyzzy", "plugh", "frotz", "secret-name") for text in texts)


def test_card_goes_to_a_folder_with_its_plots(lora_da, stored, tmp_path):
    code, out, _ = lora_da("card", stored, "--output", tmp_path / "card", "--quiet")
    assert code == 0
    assert out.split() == [
        str(tmp_path / "card" / name) for name in ("README.md", "guidance_spectra.png", "step_search.png")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--license", "other"], "--license other needs --license_name"),
        (["--license", "Apache 2.0"], "license='Apache 2.0' is no identifier of a licence"),
    ],
)
def test_a_licence_without_a_name_or_malformed_is_refused(lora_da, stored, tmp_path, flags, message):
    code, out, err = lora_da("card", stored, *flags)
    assert (code, out) == (1, "")
    assert message in err
    assert lora_da("card", stored, "--license", "other", "--license_name", "own")[0] == 0
    if flags[-1] == "other":
        assert message in lora_da("push", stored, "user/name", *flags)[2]


def test_card_replaces_only_a_card(lora_da, stored, tmp_path):
    readme = tmp_path / "README.md"
    for text in ("# Mine", "---\ntags: [lora]\n---\n", "---\ntags: 3\n---\n"):
        readme.write_text(text, encoding="utf-8")
        code, _, err = lora_da("card", stored, "--output", tmp_path)
        assert code == 1
        assert "README.md is no card of lora-da, and would be lost. Name another folder, or give --overwrite" in err
        assert readme.read_text(encoding="utf-8") == text
    assert lora_da("card", stored, "--output", tmp_path, "--overwrite")[0] == 0
    assert lora_da("card", stored, "--output", tmp_path, "--license", "mit")[0] == 0
    assert "license: mit" in readme.read_text(encoding="utf-8")


def test_a_file_in_the_place_of_a_folder_or_the_reverse_is_said(lora_da, stored, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    for words in (["show", stored, "--plots", file], ["card", stored, "--output", file]):
        code, _, err = lora_da(*words)
        assert code == 1
        assert f"{file} is a file, or lies in one. Name a folder" in err
        assert "hf auth login" not in err
    file.write_bytes("Größe".encode("latin-1"))
    code, _, err = lora_da("push", stored, "user/name", "--card", file)
    assert code == 1
    assert "file, given as --card, is not UTF-8" in err
    code, _, err = lora_da("push", stored, "user/name", "--card", tmp_path / "nofile")
    assert code == 1
    assert "nofile, given as --card, is not a file" in err
    assert "hf auth login" not in err


def test_the_command_on_a_card_gives_the_same_settings(stored):
    card = render_card(load_init(stored), license=None)
    command = re.search(r"```\n(lora-da init .+)\n```", card)[1]
    init = next(verb for verb in VERBS if verb.name == "init")
    arguments = make_parser(init).parse_args(command.split()[1:])
    from lora_da_hf.cli.flags import read
    from lora_da_hf.training.arguments import LoraArguments, LoRADAArguments

    stored_config = LoRADAConfig.from_dict({**load_init(stored).report.config, "seed": 42})
    assert read(LoRADAArguments, arguments).to_config() == stored_config
    assert read(LoraArguments, arguments).lora_rank == 2


def test_the_command_on_a_card_names_the_commit_and_the_dropout(stored):
    init = load_init(stored)
    base = {**init.manifest.base_model, "name_or_path": "org/base", "revision": "c" * 40}
    manifest = dataclasses.replace(init.manifest, base_model=base)
    init = dataclasses.replace(init, manifest=manifest, peft_config={**init.peft_config, "lora_dropout": 0.1})
    card = render_card(init, license=None)
    assert f"lora-da init org/base DATA OUTPUT --lora_rank 2 --model_revision {'c' * 40} --lora_alpha" in card
    assert "--lora_dropout 0.1" in card


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"q_proj": 1}},
        {"use_dora": True},
        {"task_type": "SEQ_CLS"},
        {"lora_alpha": 2.5},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_card_has_no_command_for_an_adapter_without_flags(stored, change):
    init = load_init(stored)
    card = render_card(dataclasses.replace(init, peft_config={**init.peft_config, **change}), license=None)
    assert "lora-da init" not in card
    name, value = next(iter(change.items()))
    assert f"{name}={json.dumps(value)}".replace("true", "True") in card


# --------------------------------------------------------------------------------------------- verbs that only call


@pytest.fixture
def replace(monkeypatch):
    """Return ``replace(module, name, result)``, which puts a recorder in the place of a function."""

    def make(module, name, result):
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        if module not in sys.modules:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[module], name, record, raising=False)
        return calls

    return make


def test_refit_hands_on_what_is_given(lora_da, replace, stored, tmp_path):
    calls = replace("lora_da_hf.pipeline.refit", "refit_init", None)
    code, out, err = lora_da("refit", stored, tmp_path / "new", "--rank", 2, "--quiet")
    assert (code, out) == (0, f"{tmp_path / 'new'}\n"), err
    lora_da("refit", stored, tmp_path / "new", "--da_input_damping", "0.3*mean", "--step_size", "0.5")
    lora_da("refit", stored, tmp_path / "new", "--rank_budget", 1000)
    assert [args for args, _ in calls] == [(stored, tmp_path / "new")] * 3
    rest = dict.fromkeys(["config", "rank", "rank_budget", "step_size", "base_model"]) | {"progress": False}
    assert [kwargs for _, kwargs in calls] == [
        {**rest, "rank": 2},
        {**rest, "config": {"input_damping": "0.3*mean"}, "step_size": 0.5},
        {**rest, "rank_budget": 1000},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--da_memory_budget", "1GiB"], "--da_memory_budget is for a pass over data, and refit makes none"),
        (["--da_schedule", "samples"], "--da_schedule is for a pass over data"),
        (["--da_step_size", "0.5", "--step_size", "0.7"], "--step_size and --da_step_size say the same thing"),
        (["--da_rank_budget", "900", "--rank_budget", "800"], "--rank_budget and --da_rank_budget say the same thing"),
    ],
)
def test_refit_refuses_flags_that_would_change_nothing(lora_da, stored, tmp_path, words, message):
    code, _, err = lora_da("refit", stored, tmp_path / "new", *words)
    assert code == 1
    assert message in err
    assert not (tmp_path / "new").exists()


def test_the_help_of_refit_shows_the_settings_that_it_takes_and_each_once(lora_da):
    _, out, _ = lora_da("refit", "--help")
    named = set(re.findall(r"--(?:da_)?([a-z_]+)", out))
    assert named & {field.name for field in dataclasses.fields(LoRADAConfig)} == FREE_IN_REFIT
    assert not {"--da_step_size", "--da_rank_budget"} & set(re.findall(r"--[a-z_]+", out))
    text = " ".join(out.split())
    assert "(default: as stored)" in text
    assert "0.1*mean)" not in text


def test_refit_refuses_a_setting_of_the_pass_even_at_its_default(lora_da, stored, tmp_path):
    assert load_init(stored).manifest.config.num_samples != LoRADAConfig().num_samples
    words = [stored, tmp_path / "new", "--da_num_samples", LoRADAConfig().num_samples]
    code, _, err = lora_da("refit", *words)
    assert code == 1
    assert f"num_samples={LoRADAConfig().num_samples}: the statistics were taken with num_samples=12" in err
    code, _, err = lora_da("refit", stored, tmp_path / "new", "--rank", 9)
    assert code == 1
    assert "(--da_max_rank 9)" in err


PUSHED = SimpleNamespace(
    url="https://hub.example/user/name",
    repo_id="user/name",
    commit="c" * 40,
    pull_request_url=None,
    tag="v1",
    private=True,
    changed=True,
)


NO_FACTS = {
    **dict.fromkeys(["license", "license_name", "license_link", "base_model", "hardware"]),
    **{name: [] for name in ("datasets", "language", "notes")},
}


def test_push_is_private_unless_asked_otherwise(lora_da, replace, tmp_path):
    calls = replace("lora_da_hf.hub", "push_init", PUSHED)
    code, out, err = lora_da("push", tmp_path, "user/name")
    assert (code, err) == (0, "")
    assert "https://hub.example/user/name" in out
    assert "pull request" not in out
    assert calls[0] == (
        (tmp_path, "user/name"),
        {
            "private": True,
            "create_pr": False,
            "parent_commit": None,
            "revision": None,
            "commit_message": None,
            "card": None,
            **NO_FACTS,
        },
    )


def test_a_push_of_what_is_there_already_says_so(lora_da, replace, tmp_path):
    replace("lora_da_hf.hub", "push_init", SimpleNamespace(**{**vars(PUSHED), "changed": False}))
    code, out, err = lora_da("push", tmp_path, "user/name")
    assert code == 0
    assert "user/name" in out
    assert "holds these files already, so nothing was committed" in err


def test_push_hands_on_every_flag(lora_da, replace, tmp_path):
    (tmp_path / "card.md").write_text("# card", encoding="utf-8")
    calls = replace("lora_da_hf.hub", "push_init", PUSHED)
    words = ["--public", "--create-pr", "--parent_commit", "d" * 40, "--revision", "next", "--commit_message", "Add"]
    words += ["--license", "other", "--license_name", "own", "--license-link", "LICENSE", "--base_model", "org/base"]
    words += [
        "--datasets",
        "a/b",
        "some notes",
        "--language",
        "en",
        "de",
        "--hardware",
        "a laptop",
        "--notes",
        "Short.",
    ]
    _, out, _ = lora_da("push", tmp_path, "user/name", *words, "--card", tmp_path / "card.md", "-q")
    assert out == f"user/name@{'c' * 40}\n"
    assert calls[0][1] == {
        "private": False,
        "create_pr": True,
        "parent_commit": "d" * 40,
        "revision": "next",
        "commit_message": "Add",
        "card": "# card",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "base_model": "org/base",
        "datasets": ["a/b", "some notes"],
        "language": ["en", "de"],
        "hardware": "a laptop",
        "notes": ["Short."],
    }


@pytest.mark.parametrize("words", [["user/name@v1"], ["user/name", "--revision", "v1"]])
def test_pull_takes_the_revision_in_two_ways(lora_da, replace, tmp_path, words):
    pulled = SimpleNamespace(folder=tmp_path, source="user/name@" + "c" * 40)
    calls = replace("lora_da_hf.hub", "pull_init", pulled)
    code, out, _ = lora_da("pull", *words, "--rank", 4, "--local_files_only", "--json")
    assert code == 0
    assert json.loads(out) == {"folder": str(tmp_path), "repo_id": "user/name", "commit": "c" * 40}
    assert calls[0] == (
        ("user/name",),
        {
            "revision": "v1",
            "rank": 4,
            "base_model": None,
            "cache_dir": None,
            "local_dir": None,
            "overwrite": False,
            "local_files_only": True,
        },
    )
    assert lora_da("pull", *words, "--quiet")[1] == f"{tmp_path}\n"


def test_pull_compares_a_base_model_that_it_loads(lora_da, replace, place, tmp_path, stored):
    pulled = SimpleNamespace(folder=tmp_path, source="user/name@" + "c" * 40)
    calls = replace("lora_da_hf.hub", "pull_init", pulled)
    assert lora_da("pull", "user/name", "--base_model", place / "model", "--quiet")[0] == 0
    expected = load_init(stored).manifest.base_model
    model = calls[0][1]["base_model"]({"task_type": "CAUSAL_LM"})
    assert base_model_facts(model).weights_sha256 == expected.weights_sha256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["user/name@"], "'user/name@' names an empty revision"),
        (["user/name", "--revision", ""], "'user/name' names an empty revision"),
        (["user/name@v1", "--revision", "v2"], "names a revision, and --revision=v2 another"),
    ],
)
def test_a_revision_that_is_none_or_two_is_an_error(lora_da, replace, words, message):
    calls = replace("lora_da_hf.hub", "pull_init", None)
    code, out, err = lora_da("pull", *words)
    assert (code, out, calls) == (1, "", [])
    assert message in err


def test_list_is_a_table(lora_da, replace):
    item = SimpleNamespace(
        repo_id="user/name", commit="c" * 40, private=True, base_model="org/base", rank=8, tags=["lora-da"]
    )
    calls = replace("lora_da_hf.hub", "list_inits", [item])
    _, out, _ = lora_da("list", "--base_model", "org/base", "--limit", 5)
    assert calls[0] == ((), {"base_model": "org/base", "author": None, "limit": 5})
    header, _, row = out.strip().splitlines()
    assert header.split() == ["repository", "commit", "base", "model", "rank"]
    assert row.split() == ["user/name", "c" * 12, "private", "org/base", "8"]
    assert lora_da("list", "--quiet")[1] == "user/name\n"
    assert json.loads(lora_da("list", "--json")[1])["initialisations"][0]["rank"] == 8


def test_list_of_nothing(lora_da, replace):
    replace("lora_da_hf.hub", "list_inits", [])
    assert lora_da("list")[:2] == (0, "Nothing found.\n")
