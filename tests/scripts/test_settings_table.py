"""The page of settings says what LoRADAConfig says."""

import sys
from pathlib import Path

import pytest

from lora_da_hf.report import COLUMNS

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import settings_table


def test_the_page_of_settings_is_what_the_settings_say(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["settings_table.py", "--check"])
    settings_table.main()
    stale = tmp_path / "settings.md"
    stale.write_text(settings_table.page().replace("`num_samples`", "`samples`"), encoding="utf-8")
    monkeypatch.setattr(settings_table, "PAGE", stale)
    with pytest.raises(SystemExit, match=r"run python scripts/settings_table.py"):
        settings_table.main()


def test_defaults_stand_beside_the_papers():
    lines = settings_table.page().splitlines()
    assert any(line.startswith('| `input_damping` | `"0.1*mean"` (`1e-06`) | Added to the diagonal') for line in lines)
    assert any(line.startswith("| `num_samples` | `256` | Samples for the") for line in lines)


def test_every_column_of_the_report_is_explained():
    assert set(COLUMNS) - {"rank"} <= set(settings_table.EXPLAINED)
    assert "| \\|sBA\\| | Frobenius norm" in settings_table.page()
