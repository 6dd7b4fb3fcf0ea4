"""The report as a table for people, JSON for machines and numbers for a log."""

import json

from lora_da_hf.report import LayerReport, LoRADAReport


def layer(number, kind="q_proj", **changes):
    values = {
        "name": f"model.layers.{number}.self_attn.{kind}",
        "in_features": 48,
        "out_features": 80,
        "shares_input_with": f"model.layers.{number}.self_attn.{kind}",
        "rank": 4,
        "peft_scaling": 2.0,
        "num_tokens": 100 + number,
        "num_grad_tokens": 100 + number,
        "input_damping": 0.01,
        "output_damping": 1e-9,
        "eigenvalues": [-0.9 - number / 1000, -0.5],
        "displacement_norm": 123.0,
        "solver": "eigh",
        "residual": 1e-15,
        "update_norm": 0.25,
    }
    return LayerReport(**{**values, **changes})


def report_of(*layers, **changes):
    values = {
        "num_samples": 256,
        "num_search_samples": 16,
        "num_unseen_samples": 16,
        "population_size": 7473,
        "batch_size": 8,
        "loss_reduction": "sum (measured)",
        "step_size": 0.1,
        "step_size_by_rank": {4: 0.1, 1: 0.2},
        "search": [(0.1, 1.5), (0.3162, 1.8)],
        "search_loss_before": 2.0,
        "search_loss_after": 1.5,
        "unseen_loss_before": 2.0,
        "unseen_loss_after": 1.6,
        "seconds": {"statistics": 1.5, "solve": 0.5},
        "config": {"num_samples": 256},
        "data_fingerprint": "abc",
        "notes": ["something to know"],
        "artifact": "out/lora_da",
    }
    return LoRADAReport(layers=list(layers), **{**values, **changes})


def rows_of(text):
    """Return the cells of the table's header and rows."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    body = lines[start + 2 :]
    end = body.index("") if "" in body else len(body)
    return lines[start].split(), [line.split() for line in body[:end]]


def test_json_gives_the_report_back(tmp_path):
    report = report_of(layer(0, notes=["a note"]), layer(1), kept={"lm_head": "it is no linear layer"})
    report.save(tmp_path / "report.json")
    assert LoRADAReport.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["step_size_by_rank"] == {"4": 0.1, "1": 0.2}


def test_the_summary_says_what_the_step_bought_on_which_samples():
    text = str(report_of(layer(0), config={"layer_steps": "equal"}))
    assert "samples     256 (population 7473), 8 at a time; loss: sum (measured)" in text
    assert "step size   0.1; all layers equally far\n" in text
    assert "loss        2.0000 -> 1.5000 (-25.0 %) on 16 search samples" in text
    assert "loss        2.0000 -> 1.6000 (-20.0 %) on 16 unseen samples" in text
    assert "time        statistics 1.5 s, solve 0.5 s" in text
    assert "note        something to know" in text


def test_a_few_layers_have_a_row_each():
    header, rows = rows_of(str(report_of(*(layer(number) for number in range(32)))))
    assert header[0] == "layer"
    assert [row[0] for row in rows] == [f"model.layers.{number}.self_attn.q_proj" for number in range(32)]


def test_many_layers_have_a_row_for_each_kind_with_ranges():
    layers = [layer(number, kind) for number in range(20) for kind in ("q_proj", "k_proj")]
    text = str(report_of(*layers))
    _, rows = rows_of(text)
    assert [row[:3] for row in rows] == [["q_proj", "(20", "layers)"], ["k_proj", "(20", "layers)"]]
    assert "100 .. 119" in text
    assert "-0.92 .. -0.9" in text
    _, all_rows = rows_of(report_of(*layers).table())
    assert len(all_rows) == 40


def test_kept_layers_are_listed_and_many_notes_cut():
    text = str(report_of(layer(0, notes=[f"note {n}" for n in range(23)]), kept={"a.b": "its gradient is zero"}))
    assert "1 layers keep PEFT's own initialisation:\n  a.b: its gradient is zero" in text
    assert "Notes:\n  model.layers.0.self_attn.q_proj: note 0" in text
    assert "note 19" in text
    assert "note 20" not in text
    assert "... and 3 more in the manifest" in text


def test_metrics_are_numbers_and_leave_out_what_is_not_known():
    metrics = report_of(layer(0), unseen_loss_before=None, unseen_loss_after=None, kept={"a": "b"}).metrics()
    assert metrics == {
        "lora_da_step_size": 0.1,
        "lora_da_search_loss_before": 2.0,
        "lora_da_search_loss_after": 1.5,
        "lora_da_seconds": 2.0,
        "lora_da_layers": 1.0,
        "lora_da_layers_kept": 1.0,
    }
    assert all(type(value) is float for value in metrics.values())
