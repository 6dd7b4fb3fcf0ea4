"""An initialisation made of facts alone: a card needs the manifest, the report and PEFT's configuration, no tensors."""

import json

import pytest
from card_facts import make_manifest, make_report

from lora_da_hf.artifacts.schema import ADAPTER_CONFIG_FILE, REPORT_FILE
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.artifacts.stored_report import read_report


@pytest.fixture
def stored(tmp_path):
    """Return ``stored(*, manifest, report, adapter)``, which puts the facts of an initialisation into a folder."""

    def make(*, manifest=None, report=None, adapter=None):
        adapter = {"lora_alpha": 16, "task_type": "CAUSAL_LM", "use_rslora": False} if adapter is None else adapter
        (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(adapter), encoding="utf-8")
        (report or make_report()).save(tmp_path / REPORT_FILE)
        manifest = manifest or make_manifest()
        return StoredInit(folder=tmp_path, manifest=manifest, bases={}, report=read_report(tmp_path / REPORT_FILE))

    return make
