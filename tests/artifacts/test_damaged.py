"""Folders that are damaged, or that would do something else than they say: each is refused in one line, and soon."""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from harness import BASE_NAME, change_tensors, forge_manifest, make_init
from local_hub import LocalHub, Repo
from safetensors.torch import load_file, save_file

from lora_da_hf import apply_init, load_init
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASIS_FILE, MANIFEST_FILE
from lora_da_hf.artifacts.store import load_manifest
from lora_da_hf.cli.main import main
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError, HubError
from lora_da_hf.hub import pull_init, push_init

STATISTICS_FILE = "lora_da_statistics-00001-of-00001.safetensors"
FILES = [MANIFEST_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE, STATISTICS_FILE]
LAYER = "model.layers.0.self_attn.q_proj"
MEGABYTES = 1 << 10
"""In the kilobytes of the kernel."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_init(tmp_path_factory.mktemp("whole") / "init")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "init")


def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture(scope="module")
def hub():
    hub = LocalHub()
    yield hub
    hub.close()


@pytest.fixture
def refuses(folder, hub, tmp_path, lora_model, tiny_llama, capsys):
    """Return ``refuses(file, *words)``: all that reads the folder refuses it, in one line that names file and words."""

    def pull():
        repo = hub.repos["alice/init"] = Repo("alice/init", private=True)
        repo.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        pull_init("alice/init", endpoint=hub.endpoint, token="hf_alice", cache_dir=tmp_path / "cache")

    def check(file, *words):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = peak(), time.process_time()
        with pytest.raises(ArtifactError) as caught:
            load_init(folder)
        assert time.process_time() - start < 5
        assert peak() - before < 500 * MEGABYTES
        text = str(caught.value)
        for word in (str(folder / file), *words):
            assert word in text
        assert "\n" not in text
        assert len(text) < 600
        assert main(["verify", str(folder)]) == 1
        assert text in capsys.readouterr().err
        hub.log.clear()
        with pytest.raises(ArtifactError, match=re.escape(text)):
            push_init(folder, "alice/init", endpoint=hub.endpoint, token="hf_alice")
        assert not hub.log
        if "statistics" not in file:  # which nobody needs to start from
            model = lora_model(model=tiny_llama(name_or_path=BASE_NAME), target_modules=["q_proj", "v_proj"])
            with pytest.raises(ArtifactError, match=re.escape(text)):
                apply_init(model, folder)
        if file in FILES:  # of another the Hub's cache may hold what it likes
            with pytest.raises((ArtifactError, HubError), match=file):
                pull()

    return check


def change_config(folder, **changes):
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    forge_manifest(folder)


# What a disk or a network does


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_refused(folder, refuses, file):
    content = bytearray((folder / file).read_bytes())
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        (folder / file).write_bytes(content)
        refuses(file)
        content[place] ^= 1


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_refused(folder, refuses, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-7])
    refuses(file)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused(folder, refuses, file):
    (folder / file).unlink()
    refuses(file)


@pytest.mark.parametrize("file", ["adapter_model.bin", "modeling.py", "lora_da_statistics-00002-of-00002.safetensors"])
def test_an_added_file_is_refused(folder, refuses, file):
    (folder / file).write_bytes(pickle.dumps(print))
    refuses(file)
    files = load_manifest(folder).files
    forge_manifest(folder, files={**files, file: files[ADAPTER_FILE]})
    refuses(file if "statistics" in file else MANIFEST_FILE)


# What somebody writes, with hashes that are right


@pytest.mark.parametrize("file", [ADAPTER_FILE, BASIS_FILE, STATISTICS_FILE])
def test_a_pickle_is_refused(folder, refuses, file):
    (folder / file).write_bytes(pickle.dumps({"a": print}))
    forge_manifest(folder)
    refuses(file, "safetensors")


@pytest.mark.parametrize(
    "key", ["model.norm.weight", "base_model.model.model.norm.weight", f"base_model.model.{LAYER}.lora_C.weight"]
)
def test_a_tensor_that_is_none_of_the_adapters_own_is_refused(folder, refuses, key):
    change_tensors(folder / ADAPTER_FILE, lambda tensors: tensors.update({key: torch.zeros(48)}))
    forge_manifest(folder)
    refuses(ADAPTER_FILE, key)


@pytest.mark.parametrize("change", ["missing", "shape", "nan", "step"])
def test_an_adapter_that_is_not_the_step_along_the_basis_is_refused(folder, refuses, change):
    key = f"base_model.model.{LAYER}.lora_B.weight"
    changes = {
        "missing": lambda tensors: tensors.pop(key),
        "shape": lambda tensors: tensors.update({key: tensors[key][:-1].contiguous()}),
        "nan": lambda tensors: tensors[key].view(-1)[:1].fill_(float("nan")),
        "step": lambda tensors: tensors[key].mul_(1.01),
    }
    change_tensors(folder / ADAPTER_FILE, changes[change])
    forge_manifest(folder)
    refuses(ADAPTER_FILE, LAYER)


def test_a_basis_of_another_shape_or_dtype_is_refused(folder, refuses):
    change_tensors(folder / BASIS_FILE, lambda t: t.update({f"{LAYER}.basis_A": t[f"{LAYER}.basis_A"].double()}))
    forge_manifest(folder)
    refuses(BASIS_FILE, f"{LAYER}.basis_A")


def test_statistics_of_another_shape_are_refused(folder, refuses):
    change_tensors(folder / STATISTICS_FILE, lambda t: t.pop(f"{LAYER}.weight_grad"))
    forge_manifest(folder)
    with pytest.raises(ArtifactError, match=re.escape(f"{LAYER}.weight_grad")):
        load_init(folder)


def test_another_base_is_refused(folder, lora_model, tiny_llama):
    for model in (tiny_llama(seed=1), tiny_llama(hidden_size=64)):
        other, start = lora_model(model=model), time.process_time()
        with pytest.raises(BaseModelMismatchError) as caught:
            apply_init(other, folder)
        assert time.process_time() - start < 5
        assert f"{folder} was computed for '{BASE_NAME}', and the model differs: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kasa_config", {}),
        ("alora_invocation_tokens", []),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("exclude_modules", "q_proj"),
        ("what_peft_adds_next", None),
        ("auto_mapping", {"base_model_class": "A", "parent_library": "os"}),
        ("target_modules", "(a+)+$"),
        ("target_modules", ["q_proj", "v_proj", "k_proj"]),
        ("target_modules", ["v_proj"]),
        ("target_modules", None),
        ("modules_to_save", [".*"]),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"^" + re.escape(LAYER): 2}),
        ("alpha_pattern", {"^" + re.escape(LAYER): 1}),
        ("lora_alpha", 17),
        ("r", 8),
        ("use_rslora", True),
        ("use_dora", "yes"),
        ("peft_type", "LOHA"),
        ("base_model_name_or_path", "other/base"),
        ("revision", "main"),
    ],
)
def test_a_config_that_is_neither_ours_nor_pefts_default_is_refused(folder, refuses, key, value):
    change_config(folder, **{key: value})
    refuses(ADAPTER_CONFIG_FILE, *([] if key in ("rank_pattern", "alpha_pattern", "use_rslora") else [key]))


def test_what_has_pefts_default_is_read(folder):
    change_config(folder, kasa_config=None, megatron_core="megatron.core", qalora_group_size=16, loftq_config={})
    assert load_init(folder).peft_config["r"] == 4


def test_the_revision_of_the_base_is_that_of_the_manifest(folder, refuses):
    base = load_init(folder).manifest.base_model.model_copy(update={"revision": "a" * 40})
    forge_manifest(folder, base_model=base)
    change_config(folder, revision="a" * 40)
    load_init(folder)
    for other in ("b" * 40, None):
        change_config(folder, revision=other)
        refuses(ADAPTER_CONFIG_FILE, "revision")


def test_another_schema_is_refused(folder, refuses):
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    refuses(MANIFEST_FILE, "schema_version", "this version of lora_da_hf")


@pytest.mark.parametrize("change", [{"step_size": -1.0}, {"seed": "x"}, {"config": {"num_samples": 0}}, {"layers": []}])
def test_a_manifest_that_cannot_be_is_refused(folder, refuses, change):
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest.pop("checksum")
    manifest["report"].update(change)
    text = json.dumps(manifest, indent=1)[1:] + "\n"
    path.write_text(f'{{\n "checksum": "{hashlib.sha256(text.encode()).hexdigest()}",{text}')
    refuses(MANIFEST_FILE)


def test_layers_of_unlike_scaling_are_refused(folder, refuses):
    report = load_manifest(folder).report
    first, *others = report.layers
    layers = [dataclasses.replace(first, peft_scaling=2 * first.peft_scaling), *others]
    forge_manifest(folder, report=dataclasses.replace(report, layers=layers))
    refuses(ADAPTER_CONFIG_FILE, "scaling")


# What exhausts a reader


def long_manifest(folder):
    """A manifest whose many values take far more memory than its text."""
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"eigenvalues": [', '"eigenvalues": [' + "0," * 8_000_000, 1))


def many_targets(folder):
    change_config(folder, target_modules=[f"z{number}" for number in range(300_000)])


def long_header(folder):
    header = json.dumps({"__metadata__": {"a": "x" * (64 << 20)}}).encode()
    (folder / ADAPTER_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    forge_manifest(folder)


@pytest.mark.parametrize(
    ("make", "file", "word"),
    [
        (long_manifest, MANIFEST_FILE, "larger"),
        (many_targets, ADAPTER_CONFIG_FILE, "target_modules"),
        (long_header, ADAPTER_FILE, "header"),
    ],
)
def test_what_would_exhaust_a_reader_is_refused_before_any_work(folder, refuses, make, file, word):
    make(folder)
    refuses(file, word)


def test_another_head_than_the_adapters_is_not_read_as_tied(folder, refuses):
    tensors = load_file(folder / ADAPTER_FILE)
    saved = torch.randn(3, 4)
    tensors |= {"base_model.model.z.weight": saved, "base_model.model.y.weight": saved.clone()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    change_config(folder, modules_to_save=["z"], ensure_weight_tying=True)
    load_init(folder)
    change_tensors(folder / ADAPTER_FILE, lambda tensors: tensors["base_model.model.y.weight"].add_(1))
    forge_manifest(folder)
    refuses(ADAPTER_FILE, "base_model.model.y.weight")
