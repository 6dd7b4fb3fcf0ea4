"""The report as a table for people, JSON for machines and numbers for a log."""

import json

from card_facts import make_report

from lora_da_hf.report import LoRADAReport


def rows_of(text):
    """Return the cells of the table's rows."""
    lines = text.split("\n")
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("layer ")) + 2 :]
    return [line.split() for line in body[: body.index("")]]


def test_json_gives_the_report_back(tmp_path):
    report = make_report(notes=["a note"])
    report.save(tmp_path / "report.json")
    assert LoRADAReport.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["step_size_by_rank"] == {"1": 0.3, "4": 0.3}


def test_a_few_layers_have_a_row_each_and_many_one_for_each_kind_with_ranges():
    names = [f"layers.{number}.{kind}" for number in range(20) for kind in ("q_proj", "k_proj")]
    assert [row[0] for row in rows_of(str(make_report(names[:32])))] == names[:32]
    report = make_report([*names, "model.score"])
    assert [row[:3] for row in rows_of(str(report))[:2]] == [["q_proj", "(20", "layers)"], ["k_proj", "(20", "layers)"]]
    assert rows_of(str(report))[2][0] == "model.score"
    assert "-1 .. 2.8" in str(report)


def test_kept_layers_are_listed_and_many_notes_cut():
    report = make_report()
    report.layers[0].notes = [f"note {n}" for n in range(23)]
    text = str(report)
    assert "1 layers keep PEFT's own initialisation:\n  lm_head: not a linear layer" in text
    assert "Notes:\n  model.layers.0.self_attn.q_proj: note 0" in text
    assert "note 19" in text
    assert "note 20" not in text
    assert "... and 3 more in the manifest" in text


def test_metrics_are_numbers_and_leave_out_what_is_not_known():
    metrics = make_report(unseen_loss_before=None, unseen_loss_after=None).metrics()
    assert metrics == {
        "lora_da_step_size": 0.3,
        "lora_da_search_loss_before": 2.75,
        "lora_da_search_loss_after": 2.25,
        "lora_da_seconds": 4.25,
        "lora_da_layers": 9.0,
        "lora_da_layers_kept": 1.0,
    }
    assert all(type(value) is float for value in metrics.values())
