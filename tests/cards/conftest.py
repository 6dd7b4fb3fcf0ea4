"""An initialisation made of facts alone: a card needs the manifest, the report and PEFT's configuration, no tensors."""

import pytest
from card_facts import make_manifest, make_report
from lora_da_hf.artifacts.stored_report import read_report

from lora_da_hf.artifacts.manifest import REPORT_FILE
from lora_da_hf.artifacts.store import StoredInit

ADAPTER = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def stored(tmp_path):
    """Return ``stored(*, manifest, report, adapter)``, which puts the facts of an initialisation into a folder."""

    def make(*, manifest=None, report=None, adapter=None):
        (report or make_report()).save(tmp_path / REPORT_FILE)
        manifest = manifest or make_manifest()
        return StoredInit(
            folder=tmp_path,
            manifest=manifest,
            bases={},
            report=read_report(tmp_path / REPORT_FILE, manifest),
            peft_config={**ADAPTER, **(adapter or {})},
        )

    return make
