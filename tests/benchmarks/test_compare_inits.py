"""The comparison of initialisations on a tiny random model: every method, going on after a kill, designs, reports."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from harness import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compare_inits
import designs
import inits
import lines
import report

from lora_da_hf.errors import ConfigError

BLOCK = {
    "name": "all",
    "methods": sorted({*inits.METHODS, *inits.FROZEN, *inits.RESET, *inits.MERGED}),
    "learning_rates": [1e-3],
    "ranks": [2],
    "seeds": [0],
    "steps": [4],
}
NO_OPS = {"lora_fa", "pissa", "olora", "corda", "eva", "lora_ga", "lora_beside_da"}
"""Methods that leave the model's function as it is at step 0."""

SMALL = {"batch_size": 4, "num_samples": 12, "evaluations": 2, "alpha": 4}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(hidden_size=16, intermediate_size=24, num_attention_heads=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows(count, first):
    words = [[f"w{3 + (i * 5 + 7 * k) % 20}" for k in range(4 + i % 5)] for i in range(first, first + count)]
    return [{"question": " ".join(w[:2]), "answer": " ".join(w[2:])} for w in words]


@pytest.fixture
def compare(model_dir, tmp_path):
    """Return a function that runs the command with a design, and returns the records."""
    for name, part in (("train", rows(40, 0)), ("validation", rows(6, 40))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def run(*blocks, flags=(), **shared):
        (tmp_path / "design.json").write_text(json.dumps({**SMALL, **shared, "blocks": blocks}))
        output = tmp_path / "results.jsonl"
        files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}
        compare_inits.main(
            [
                *("--design", str(tmp_path / "design.json"), "--output", str(output)),
                *("--model_name_or_path", str(model_dir), "--block_size", "16"),
                *("--train_file", str(files["train"]), "--validation_file", str(files["validation"])),
                *("--prompt_column", "question", "--completion_column", "answer", *flags),
            ]
        )
        return lines.read_lines(output)

    return run


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # in PEFT's LoRA-GA
def test_every_method_runs_on_equal_terms(compare):
    records = {record["cell"]["method"]: record for record in compare(BLOCK)}
    assert set(records) == {name for name in BLOCK["methods"] if inits.why_missing(name) is None}
    base = records["lora"]["losses"][0][1]
    for method, record in records.items():
        assert [step for step, _ in record["losses"]] == [0, 2, 4]
        assert record["final_loss"] == record["losses"][-1][1]
        assert len(record["train_losses"]) == 4
        assert record["initialization"]["seconds"] > 0
        assert record["training"]["peak_mib"] > 0
        expected = {**designs.SHARED, **SMALL, "method": method}
        expected |= {"learning_rate": 1e-3, "rank": 2, "seed": 0, "steps": 4}
        if not record["reads_samples"]:
            del expected["reads"]  # which makes no difference to it
        assert record["cell"] == expected
        assert record["command"][:2] == ["--design", "design.json"]
        if method in NO_OPS:
            assert record["losses"][0][1] == pytest.approx(base, rel=2e-2), method
    for method in ("lora_da", "lora_one", "whitened_gradient", "lora_da_fa"):
        assert records[method]["losses"][0][1] != pytest.approx(base, rel=1e-4)
        assert records[method]["notes"]["step_size"] > 0
    assert records["lora_fa"]["trainable"] < records["lora"]["trainable"]
    assert records["lora_fa"]["optimizer_mib"] < records["lora"]["optimizer_mib"]
    assert records["lora_da_fa"]["trainable"] == records["lora_fa"]["trainable"]
    assert records["lora_da"]["trainable"] == records["pissa"]["trainable"] == records["lora"]["trainable"]
    assert len({record["final_loss"] for record in records.values()}) > 8


def test_flags_alone_make_a_comparison_that_goes_on_and_ends_in_a_table_and_a_picture(
    model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, part in (("train", rows(40, 0)), ("validation", rows(6, 40))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row["answer"]}) + "\n" for row in part))

    def run(*flags):
        data = ("--train_file", "train.jsonl", "--validation_file", "validation.jsonl", "--block_size", "8")
        small = ("--steps", "2", "--ranks", "2", "--num_samples", "12", "--batch_size", "4", "--evaluations", "1")
        compare_inits.main(["--model_name_or_path", str(model_dir), *data, *small, *flags])
        return lines.read_lines(tmp_path / "outputs" / "comparison.jsonl")

    first = run("--methods", "lora", "lora_da", "pissa", "eva", "--learning_rates", "1e-4", "1e-3", "--seeds", "0", "1")
    made = {tuple(record["cell"][name] for name in ("method", "learning_rate", "seed")) for record in first}
    assert made == {(m, rate, k) for m in ("lora", "lora_da", "pissa", "eva") for rate in (1e-4, 1e-3) for k in (0, 1)}
    assert {record["cell"]["batch_size"] for record in first} == {4}
    shown = capsys.readouterr().out
    for row in ("| lora_da |", "| eva |", "Final loss by learning rate", "outputs/comparison.md"):
        assert row in shown
    assert "| pissa |" in (tmp_path / "outputs" / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "outputs" / "comparison_1.png").is_file()
    longer = run("--methods", "lora", "--learning_rates", "1e-3", "--seeds", "0", "1", "2")
    assert longer[: len(first)] == first
    assert [record["cell"]["seed"] for record in longer[len(first) :]] == [2]


def test_flags_beside_a_design_are_refused(compare):
    with pytest.raises(ConfigError, match="--seeds"):
        compare(BLOCK, flags=["--seeds", "5"])


def test_a_stopped_comparison_goes_on_and_repeats_to_the_bit(compare, tmp_path):
    block, output = {**BLOCK, "methods": ["lora", "lora_da"], "seeds": [0, 1]}, tmp_path / "results.jsonl"
    compare(block, flags=("--max_cells", "2"))
    before = output.read_text()
    assert len(before.splitlines()) == 2
    with output.open("a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    records = compare(block)
    assert output.read_text().startswith(before)
    assert len(records) == len({record["key"] for record in records}) == 4
    assert compare(block) == records  # to the second that each took
    output.unlink()
    assert [record["losses"] for record in compare(block)] == [record["losses"] for record in records]


@pytest.mark.parametrize("method", ["lora_da", "pissa"])
def test_a_cell_that_was_stopped_goes_on_from_its_checkpoint_and_ends_as_if_it_was_not(
    compare, model_dir, tmp_path, monkeypatch, method
):
    config = json.loads((model_dir / "config.json").read_text())
    shutil.copytree(model_dir, tmp_path / "dropping")
    (tmp_path / "dropping" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    block = {**BLOCK, "methods": [method], "schedule": "linear"}
    flags = ("--model_name_or_path", str(tmp_path / "dropping"), "--checkpoint_minutes", "0")
    (whole,) = compare(block, flags=flags)
    (tmp_path / "results.jsonl").unlink()
    step, calls = torch.optim.AdamW.step, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(block, flags=flags)
    (record,) = compare(block, flags=flags)
    assert record["resumed"] == [3]
    assert len(calls) == 4 + 1
    for name in ("losses", "train_losses", "final_loss", "cell", "key"):
        assert record[name] == whole[name]
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize("method", ["lora_da", "pissa"])
def test_cells_that_share_a_start_end_as_those_that_make_their_own(compare, tmp_path, method):
    block = {**BLOCK, "methods": [method], "learning_rates": [1e-3, 1e-2]}
    together = compare(block)
    assert [record["initialization"]["reused"] for record in together] == [False, True]
    assert together[0]["losses"][0] == together[1]["losses"][0]
    assert together[0]["final_loss"] != together[1]["final_loss"]
    (tmp_path / "results.jsonl").unlink()
    compare(block, flags=("--max_cells", "1"))
    apart = compare(block, flags=("--max_cells", "1"))
    assert [record["initialization"]["reused"] for record in apart] == [False, False]
    assert [record["losses"] for record in apart] == [record["losses"] for record in together]


def test_a_start_is_put_into_the_base_under_a_plain_adapter():
    model = inits.get_peft_model(make_tiny_llama(), inits.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    b, before = layer.lora_B["default"].weight, layer.weight.detach().clone()
    torch.nn.init.normal_(b)
    start = 2.0 * b.detach() @ layer.lora_A["default"].weight.detach()
    inits.change(model, "lora_on_da", seed=0)
    torch.testing.assert_close(layer.weight, before + start)
    assert not b.any()
    assert not layer.weight.requires_grad


def test_starts_are_solved_from_kept_statistics_of_the_same_samples_and_settings(compare, tmp_path):
    settings = [{}, {"input_damping": "1*mean", "factor_split": "balanced"}, {"token_mask": "labels"}]
    block = {**BLOCK, "methods": ["lora_da"], "ranks": [4, 2], "steps": [0], "settings": settings}
    apart = compare(block)
    assert not any(record["initialization"]["reused"] for record in apart)
    (tmp_path / "results.jsonl").unlink()
    kept = compare(block, flags=("--statistics", str(tmp_path / "kept")))
    for one, other in zip(apart, kept, strict=True):
        assert one["notes"]["step_size"] == pytest.approx(other["notes"]["step_size"], rel=1e-3)
        assert one["losses"][0][1] == pytest.approx(other["losses"][0][1], rel=1e-4)
    own = [record["cell"]["settings"] for record in kept if not record["initialization"]["reused"]]
    assert own == [settings[0], settings[2]]


def test_a_design_is_planned_before_and_after_some_of_it_is_run(compare, tmp_path, capsys):
    block = {**BLOCK, "methods": ["lora_da"], "steps": [0, 4], "settings": [{}, {"layer_steps": "equal"}]}
    compare(block, flags=["--plan"])
    assert "all: 4 cells left, 8 steps" in capsys.readouterr().out
    compare(block, flags=["--max_cells", "1"])
    compare(block, flags=["--plan"])
    assert "all: 3 cells left, 8 steps" in capsys.readouterr().out
    starts = [record["losses"][0][1] for record in compare(block)]
    assert (len(starts), len(set(starts))) == (4, 2)
    report.main([str(tmp_path / "results.jsonl")])
    shown = f'| lora_da {{"layer_steps": "equal"}} | 0.001 (alone) | {starts[-1]:.4f} (1) |'
    assert shown in capsys.readouterr().out


def test_the_best_rate_of_a_block_is_where_the_next_begins(compare, capsys):
    coarse = {**BLOCK, "name": "coarse", "methods": ["lora", "lora_fa"], "learning_rates": [1e-5, 1e-2], "steps": [6]}
    fine = {**coarse, "name": "fine", "learning_rates": {"best_of": "coarse", "times": [0.5, 1]}, "seeds": [0, 1]}
    compare(coarse, fine, flags=["--plan"])
    out = capsys.readouterr().out
    assert "coarse: 4 cells left, 24 steps" in out
    assert "fine: The best learning rate of lora is not known before its cells are run." in out
    records = compare(coarse, fine)
    rates = {(r["cell"]["method"], r["cell"]["learning_rate"]) for r in records if r["block"] == "fine"}
    assert rates == {("lora", 5e-3), ("lora", 1e-2), ("lora_fa", 5e-3), ("lora_fa", 1e-2)}
    assert len(records) == 4 + 8 - 2  # two cells of the fine block were in the coarse one
    compare(coarse, fine, flags=["--plan"])
    assert "fine: 0 cells left, 0 steps" in capsys.readouterr().out


def test_a_run_that_diverges_is_recorded_and_others_go_on(compare):
    records = compare({**BLOCK, "methods": ["lora"], "learning_rates": [1e30, 1e-3], "steps": [6]})
    diverged, finished = records
    assert diverged["final_loss"] is None
    assert diverged["best_loss"] == diverged["losses"][0][1]
    assert math.isfinite(finished["final_loss"])
    assert designs.best_rate([r["cell"] for r in records], records, "lora") == 1e-3
    assert "diverged" in report.spread([None])
    assert report.at_best_rate(records)[0] == 1e-3


def test_an_adapter_is_merged_and_made_anew_and_b_may_have_a_rate_of_its_own(compare):
    more = ({}, {"anew_after": 0.5}, {"lora_plus": 16})
    records = compare(*({**BLOCK, "methods": ["lora_da"], "name": str(one), **one} for one in more))
    usual, anew, plus = (record["train_losses"] for record in records)
    assert usual[:2] == anew[:2]
    assert anew[2] < usual[2]  # the step of a second start is on top of the first one's
    assert usual[1] != plus[1]
    assert set(report.variants(records)) == {"lora_da", "lora_da anew_after=0.5", "lora_da lora_plus=16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["lora", "magic"]}, "magic is not known"),
        ({"epochs": 3}, "epochs is not known"),
        ({"seeds": None}, "block 'all' lacks seeds"),
        ({"reads": "last"}, "last is not known"),
        ({"schedule": "steps"}, "steps is not known"),
        ({"settings": [{}, {"num_sample": 3}]}, "'num_sample' is not a setting"),
        ({"settings": {"num_samples": 0}}, "num_samples=0 must be at least 1"),
        ({"learning_rates": {"best_of": "all", "times": [1]}}, "takes the best rates of 'all', which is none of the"),
        ({"evaluations": 0}, "block 'all' has evaluations 0: give 1 or more"),
        ({"num_train": 0}, "block 'all' has num_train 0: give 1 or more"),
        ({"num_train": 41}, r"Block 'all' trains on 41 samples \(num_train\), and there are 40"),
    ],
)
def test_mistakes_in_a_design_are_errors(compare, change, message):
    block = {name: value for name, value in {**BLOCK, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        compare(block)


@pytest.mark.parametrize("path", sorted((Path(inits.__file__).parent / "designs").glob("*.json")), ids=lambda p: p.stem)
def test_the_designs_are_valid(path):
    design = designs.read_design(path)
    assert all("hour" in block["why"] for block in design["blocks"])
    records, seen = [], set()
    for block in design["blocks"]:
        cells = designs.cells_of(design, block, records)
        keys = {designs.key_of(cell, {}) for cell in cells}
        assert len(keys) == len(cells) > 0
        assert keys - seen  # no block repeats what others have
        seen |= keys
        assert re.search(rf"\b{len(cells)} cells? ", block["why"])
        losses = ("final_loss", "best_loss")
        records += [{"cell": cell, "choice": [1.0], **dict.fromkeys(losses, cell["learning_rate"])} for cell in cells]
