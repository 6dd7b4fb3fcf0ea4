"""Initialisations made of facts alone: a card needs the manifest and PEFT's configuration, no tensors."""

from pathlib import Path

from lora_da_hf import LoRADAConfig, LoRADAReport
from lora_da_hf.artifacts.manifest import BaseModelFacts, FileEntry, Manifest
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.report import LayerReport

LAYERS = tuple(
    f"model.layers.{number}.{part}"
    for number in range(3)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
)
ADAPTER = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BASE = {"name_or_path": "org/base-model", "revision": "b" * 40, "weights_sha256": "f" * 64}


def make_report(layers=LAYERS, **overrides):
    facts = {
        "layers": [
            LayerReport(
                name=name,
                in_features=48,
                out_features=80,
                rank=4,
                shares_input_with=layers[0],
                peft_scaling=4.0,
                num_tokens=345,
                num_grad_tokens=345,
                input_damping=0.1,
                output_damping=0.1,
                eigenvalues=[-1.0 + 0.1 * number, -0.5, -0.2, 0.01 * number, 0.1, 0.2, 0.3, 0.4],
                displacement_norm=2.0,
                residual=1e-9,
                solver="eigh",
            )
            for number, name in enumerate(layers)
        ],
        "kept": {"lm_head": "not a linear layer"},
        "seed": 42,
        "config": LoRADAConfig(num_samples=12, max_rank=8).to_dict(),
        "data_fingerprint": "d" * 64,
        "num_samples": 12,
        "num_search_samples": 4,
        "num_unseen_samples": 3,
        "population_size": 100,
        "loss_reduction": "mean (measured)",
        "step_size": 0.3,
        "step_size_by_rank": {1: 0.3, 4: 0.3},
        "search": [(0.1, 2.6), (0.3, 2.25), (1.0, None)],
        "search_loss_before": 2.75,
        "search_loss_after": 2.25,
        "unseen_loss_before": 3.0,
        "unseen_loss_after": 2.4,
        "seconds": {"statistics": 3.25, "solve": 1.0},
    }
    return LoRADAReport(**{**facts, **overrides})


def make_manifest(*, base_model=None, report=None, **overrides):
    facts = {
        "created": "2026-11-24T12:00:00+00:00",
        "versions": {"lora_da_hf": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "base_model": BaseModelFacts(**{**BASE, **(base_model or {})}),
        "report": report or make_report(),
        "files": {"adapter_model.safetensors": FileEntry(size=3_500_000, sha256="a" * 64)},
    }
    return Manifest(**{**facts, **overrides})


def make_init(folder=Path("nowhere"), *, adapter=None, **manifest):
    """Return an initialisation without bases."""
    return StoredInit(
        folder=folder,
        manifest=make_manifest(**manifest),
        bases={},
        peft_config={**ADAPTER, **(adapter or {})},
        source="sha256:0",
    )
