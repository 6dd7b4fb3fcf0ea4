"""An initialisation made of facts alone: a card needs the manifest and PEFT's configuration, no tensors."""

import pytest
from card_facts import make_manifest

from lora_da_hf.artifacts.store import StoredInit

ADAPTER = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def stored(tmp_path):
    """Return ``stored(*, manifest, report, adapter)``, which puts the facts of an initialisation into a folder."""

    def make(*, manifest=None, report=None, adapter=None):
        made = manifest or make_manifest()
        made = made if report is None else made.model_copy(update={"report": report})
        return StoredInit(
            folder=tmp_path,
            manifest=made,
            bases={},
            source=made.digest,
            peft_config={**ADAPTER, **(adapter or {})},
        )

    return make
