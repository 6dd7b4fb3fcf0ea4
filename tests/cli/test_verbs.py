"""What each verb does: on a small model where it computes, with the functions replaced where it only calls one."""

import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitInfo, ModelCardData
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from walkthrough import write_sums

import lora_da_hf.hub
from lora_da_hf import LoRADAConfig, initialize_lora_da
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.cli.main import main
from lora_da_hf.config import FREE_IN_REFIT
from lora_da_hf.training.arguments import LoraArguments

PAIRS = ["--prompt_column", "prompt", "--completion_column", "completion"]
SMALL = ["--block_size", 32, "--lora_rank", 2, "--da_num_samples", 12, "--da_search_samples", 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def stored(place, cache):
    """Return the folder of an initialisation that `lora-da init` wrote."""
    words = ["init", place / "model", place / "train.jsonl", place / "an-init", *PAIRS, *SMALL, "--da_max_rank", 4]
    assert main([str(word) for word in [*words, "--quiet"]]) == 0
    return place / "an-init"


# ------------------------------------------------------------------------------------------------------------ init


def test_init_stores_what_the_flags_say(stored):
    report = load_init(stored).report
    assert {(layer.rank, layer.max_rank) for layer in report.layers} == {(2, 4)}
    assert (report.num_samples, len(report.layers)) == (12, 14)


def test_init_prints_the_folder_and_the_losses(lora_da, place, cache, tmp_path):
    words = [place / "model", place / "train.jsonl", tmp_path / "out", *PAIRS, *SMALL, "--json"]
    code, out, err = lora_da("init", *words, "--target_modules", "q_proj", "v_proj")
    facts = json.loads(out)
    assert code == 0, err
    assert (facts["folder"], len(facts["layers"])) == (str(tmp_path / "out"), 4)
    assert facts["unseen_loss_after"] > 0
    assert "Training on prompt and completion\n" in err


def test_init_takes_several_files(lora_da, place, cache, tmp_path):
    words = [place / "model", place / "train.jsonl", place / "train.jsonl", tmp_path / "out", *PAIRS, *SMALL, "--json"]
    code, out, err = lora_da("init", *words, "--data_weights", "1", "2")
    assert code == 0, err
    assert 64 < json.loads(out)["population_size"] < 2 * 64  # of both files, and no row twice


def test_init_finds_its_own_again_and_replaces_nothing_of_yours(lora_da, place, stored, cache, tmp_path):
    words = [place / "model", place / "train.jsonl", stored, *PAIRS, *SMALL, "--da_max_rank", 4]
    code, out, err = lora_da("init", *words)
    assert (code, "reusing" in out) == (0, True), err
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    code, _, err = lora_da("init", place / "model", place / "train.jsonl", tmp_path, *PAIRS, *SMALL)
    assert (code, "thesis.tex" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl"], "missing.jsonl cannot be loaded as data"),
        (["notes.pdf"], "notes.pdf cannot be read as data"),
        (["train.jsonl", "--prompt_column", "prompt"], "--completion_column is missing"),
        (["train.jsonl"], "no column 'text', only 'prompt', 'completion'. Name pairs"),
        (
            ["train.jsonl", *PAIRS, "--target_modules", "nope"],
            "Target modules {'nope'} not found",
        ),
        (["train.jsonl", *PAIRS, "--lora_dropout", "2"], "dropout probability"),
        (["empty.jsonl"], "holds no rows"),
        (["broken.parquet"], "broken.parquet cannot be loaded as data"),
        (["train.jsonl", *PAIRS, "--tokenizer_name", "bare"], "okenizer"),
    ],
)
def test_init_says_what_is_wrong_with_its_input(lora_da, place, cache, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "train.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    shutil.copytree(place / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    data, *flags = words
    code, out, err = lora_da("init", place / "model", data, "out", *flags)
    assert (code, out) == (1, "")
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("no/such/model", "train.jsonl", "no/such/model"),
        ("folder", "train.jsonl", "folder"),
        ("train.jsonl", "train.jsonl", "train.jsonl"),
        ("folder", "org/data", "org/data cannot be loaded as data"),
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


# ------------------------------------------------------------------------------------------------------------ plan


def test_plan_says_before_what_init_says_then(lora_da, stored, place):
    code, out, err = lora_da("plan", place / "model", "--lora_rank", 2, "--da_num_samples", 12)
    assert code == 0, err
    assert out.split("; besides")[0] == load_init(stored).report.plan


@pytest.mark.parametrize(("step", "most"), [("0.5", 1.1), ("line_search", 1.7)])
def test_plan_says_how_many_tokens_init_runs_and_says_it_again(lora_da, place, cache, tmp_path, step, most):
    run = []

    def see(module, args):
        if isinstance(module, torch.nn.Embedding):
            run.append(args[0].shape)

    words = [place / "model", place / "train.jsonl", *PAIRS, "--da_num_samples", 30, "--da_step_size", step, "--json"]
    code, out, err = lora_da("plan", *words)
    assert code == 0, err
    with torch.nn.modules.module.register_module_forward_pre_hook(see):
        assert lora_da("init", *words, tmp_path / "out")[0] == 0
    facts, tokens, samples = json.loads(out), sum(map(math.prod, run)), sum(shape[0] for shape in run)
    assert 0.9 * tokens <= facts["tokens"] <= most * tokens
    assert 0.9 * samples <= facts["sample_passes"] + facts["samples_forward"] <= most * samples
    assert lora_da("plan", *words)[1] == out
    assert json.loads(lora_da("plan", *words, "--block_size", 8)[1])["longest_sample"] == 8


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's own of experts
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", [GPT2Config, MixtralConfig, Qwen3MoeConfig, GptOssConfig])
def test_plan_of_other_families_is_that_of_init(lora_da, tmp_path, kind):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3}
    mixture = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = kind(**size, **({} if kind is GPT2Config else mixture))
    config.save_pretrained(tmp_path)
    code, out, err = lora_da("plan", tmp_path, "--lora_rank", 2, "--da_num_samples", 4)
    assert code == 0, err
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraArguments(lora_rank=2).to_peft())
    samples = [{"input_ids": (ids := torch.arange(k, k + 12).tolist()), "labels": ids} for k in range(8)]
    report = initialize_lora_da(model, samples, config=LoRADAConfig(num_samples=4, search_samples=2), progress=False)
    assert out.split("; besides")[0] == report.plan


def test_plan_reads_a_config_alone_and_keeps_to_a_budget(lora_da, place, tmp_path):
    shutil.copy(place / "model" / "config.json", tmp_path)
    words = ["--world_size", 3, "--da_memory_budget", "150KiB", "--da_num_samples", 5, "--json"]
    code, out, err = lora_da("plan", tmp_path, *words)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["processes"] == 3
    assert facts["passes"] > 1
    assert facts["peak_bytes"] <= 150 * 1024
    adapter = 8 * 2 * (4 * 32 + 32 + 16 + 16 + 32 + 3 * (32 + 48))  # rank 8, two blocks
    base = sum(tensor.numel() for tensor in load_file(place / "model" / "model.safetensors").values())
    assert facts["weight_bytes"] == 4 * (base + adapter)
    assert lora_da("plan", tmp_path, "--quiet")[1].strip().isdigit()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--da_memory_budget", "1KiB"], "The statistics do not fit"),
        (["--da_memory_budget", "lots"], "memory_budget"),
        (["--target_modules", "embed_tokens"], "model.embed_tokens"),
        (["--lora_rank", "999"], "rank 999 is above its input size 32"),
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
    assert out.splitlines()[-1] == kept


# ---------------------------------------------------------------------------------------------- show, verify, card


def test_show_has_three_forms(lora_da, stored):
    code, out, err = lora_da("show", stored)
    assert (code, err) == (0, "")
    assert "model.layers.0.self_attn.q_proj" in out
    assert "max rank        4" in out
    assert "q_proj x 2, k_proj x 2" in out
    facts = json.loads(lora_da("show", stored, "--json")[1])
    assert (facts["max_rank"], facts["modules"]["q_proj"], facts["num_samples"]) == (4, 2, 12)
    assert lora_da("show", stored, "--quiet")[1].split() == [layer["name"] for layer in facts["layers"]]


def test_verify_accepts_what_was_written(lora_da, stored):
    code, out, _ = lora_da("verify", stored)
    assert code == 0
    assert re.search("ok +True", out)
    assert lora_da("verify", stored, "--quiet")[:2] == (0, "ok\n")


def test_verify_compares_the_base_model(lora_da, stored, place, tmp_path, tiny_llama):
    code, out, err = lora_da("verify", stored, "--base_model", place / "model")
    assert code == 0, err
    assert str(place / "model") in out
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    code, _, err = lora_da("verify", stored, "--base_model", tmp_path / "other")
    assert code == 1
    assert "base" in err


def test_card_goes_to_stdout_or_a_folder_and_replaces_nothing_else(lora_da, stored, tmp_path):
    code, out, _ = lora_da("card", stored, "--license", "apache-2.0", "--language", "en", "--language", "de")
    assert code == 0
    assert "license: apache-2.0" in out
    assert "language:\n- en\n- de\n" in out
    folder = tmp_path / "card"
    files = json.loads(lora_da("card", stored, "--output", folder, "--json")[1])["files"]
    assert {path.name for path in folder.iterdir()} == {path.rpartition("/")[2] for path in files}
    code, _, err = lora_da("card", stored, "--output", folder)
    assert (code, str(folder) in err) == (1, True)


# ----------------------------------------------------------------------------------------------------------- refit


def test_refit_makes_a_smaller_rank_and_takes_settings(lora_da, stored, tmp_path, monkeypatch):
    code, out, err = lora_da("refit", stored, tmp_path / "new", "--rank", 1, "--quiet")
    assert (code, out) == (0, f"{tmp_path / 'new'}\n"), err
    assert {layer.rank for layer in load_init(tmp_path / "new").report.layers} == {1}
    calls = []
    made = load_init(stored)
    monkeypatch.setattr(
        "lora_da_hf.pipeline.refit.refit_init", lambda *args, **kwargs: calls.append((args, kwargs)) or made
    )
    flags = ["--da_input_damping", "0.3*mean", "--da_variance_weight", 0.5, "--step_size", "0.5"]
    assert lora_da("refit", stored, tmp_path / "other", *flags, "--rank", 3)[0] == 0
    rest = {"rank": 3, "step_size": 0.5, "progress": False}
    config = {"input_damping": "0.3*mean", "variance_weight": 0.5}
    assert calls == [((stored, tmp_path / "other"), {**rest, "config": config})]


def test_the_help_of_refit_shows_the_settings_that_it_takes(lora_da):
    _, out, _ = lora_da("refit", "--help")
    named = set(re.findall(r"--(?:da_)?([a-z_]+)", out))
    settings = {field.name for field in dataclasses.fields(LoRADAConfig)}
    assert named & settings == FREE_IN_REFIT
    assert "--da_step_size" not in re.findall(r"--[a-z_]+", out)
    assert "(default: as stored)" in " ".join(out.split())


# ------------------------------------------------------------------------------------------------ push, pull, list


@pytest.fixture
def calls(monkeypatch, tmp_path, stored):
    """Stand in for the Hub, and list the calls."""
    found = []
    pushed = CommitInfo(f"https://huggingface.co/user/name/commit/{'c' * 40}", "message", "", "c" * 40)
    card = ModelCardData(base_model="org/base", lora_da={"max_rank": 8})
    item = SimpleNamespace(id="user/name", sha="c" * 40, private=True, card_data=card)
    results = {
        "push_init": pushed,
        "pull_init": dataclasses.replace(load_init(stored), source=f"user/name@{'c' * 40}"),
        "list_inits": [item],
    }
    for name, result in results.items():

        def record(*args, result=result, **kwargs):
            found.append((args, kwargs))
            return result

        monkeypatch.setattr(lora_da_hf.hub, name, record)
    return found


def test_push_is_private_unless_asked_otherwise_and_hands_on_every_flag(lora_da, calls, tmp_path):
    code, out, _ = lora_da("push", tmp_path, "user/name")
    assert code == 0
    assert f"https://huggingface.co/user/name/commit/{'c' * 40}" in out
    assert calls[0][0] == (tmp_path, "user/name")
    assert {name: value for name, value in calls[0][1].items() if value} == {"private": True}
    names = ("revision", "commit_message", "license", "base_model", "hardware")
    single = {name: f"its {name}" for name in names}
    words = [word for name, value in single.items() for word in (f"--{name}", value)]
    words += ["--public", "--create-pr", "--language", "en", "de", "-q"]
    _, out, _ = lora_da("push", tmp_path, "user/name", *words)
    assert out == f"user/name@{'c' * 40}\n"
    given = {name: value for name, value in calls[1][1].items() if value not in (None, [])}
    assert given == {"private": False, "create_pr": True, "language": ["en", "de"], **single}


def test_pull_hands_on_the_revision(lora_da, calls, stored):
    code, out, _ = lora_da("pull", "user/name@v1", "--json")
    assert code == 0
    assert json.loads(out) == {"folder": str(stored), "repo_id": "user/name", "commit": "c" * 40}
    given = {name: value for name, value in calls[0][1].items() if value}
    assert (calls[0][0], given) == (("user/name",), {"revision": "v1"})


def test_list_is_a_table(lora_da, calls, monkeypatch):
    _, out, _ = lora_da("list", "--base_model", "org/base", "--limit", 5)
    assert calls[0] == ((), {"base_model": "org/base", "author": None, "limit": 5})
    header, _, row = out.strip().splitlines()
    assert header.split() == ["repo", "id", "commit", "private", "base", "model", "rank"]
    assert row.split() == ["user/name", "c" * 40, "True", "org/base", "8"]
    assert lora_da("list", "--quiet")[1] == "user/name\n"
    assert json.loads(lora_da("list", "--json")[1])["initialisations"][0]["rank"] == 8
    monkeypatch.setattr(lora_da_hf.hub, "list_inits", lambda **_: [])
    assert lora_da("list")[:2] == (0, "Nothing found.\n")
