import contextlib
import dataclasses
import json
import re
import shutil
import struct
import tracemalloc

import pytest
import torch
from card_facts import make_manifest, make_report
from harness import adapter_weights, assert_same_tensors, change_tensors, forge_manifest, make_init, store_init
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_da_hf.artifacts.stored_report import read_report
from peft import PeftModel
from transformers import LlamaForCausalLM

from lora_da_hf.artifacts.manifest import ADAPTER_FILE, BASIS_FILE, MANIFEST_FILE, MAX_MANIFEST_BYTES, REPORT_FILE
from lora_da_hf.artifacts.peft_config import read_of_checkpoint
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.artifacts.tensors import read_tensors
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError
from lora_da_hf.pipeline.base_model import base_model_facts

LAYER = "model.layers.0.self_attn.q_proj"
STATISTICS_FILE = "lora_da_statistics-00001-of-00001.safetensors"
REMEDY = re.compile(
    r"\. (Do not use it|Fetch (it|all of it)|Install the version|Name another folder|Remove it|Use that base)\b"
)
FILES = [ADAPTER_FILE, "adapter_config.json", BASIS_FILE, REPORT_FILE, STATISTICS_FILE]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_init(tmp_path_factory.mktemp("original") / "init")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "init")


def change_manifest(folder, change):
    """Change the values of the manifest, without a new checksum."""
    path = folder / MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def refuses(folder, match, kind=ArtifactError, **settings):
    with pytest.raises(kind, match=match) as caught:
        load_init(folder, **settings)
    assert str(folder) in str(caught.value) or kind is BaseModelMismatchError
    assert REMEDY.search(str(caught.value)), f"it does not say what to do: {caught.value}"


def test_what_was_not_touched_is_accepted(folder):
    assert set(load_init(folder).manifest.files) == set(FILES)


# Files


@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_is_refused(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    refuses(folder, "another SHA-256 than the manifest says: it was changed. Fetch it again")


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_refused(folder, file):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-1])
    refuses(folder, f"{file} has {len(data) - 1} bytes and the manifest says {len(data)}: truncated or changed")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused(folder, file):
    (folder / file).unlink()
    refuses(folder, f"{file} is listed in the manifest and is not there as a file")


@pytest.mark.parametrize("file", FILES)
def test_a_link_in_the_place_of_a_file_is_refused(folder, file):
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)
    refuses(folder, f"{file} is listed in the manifest and is not there as a file")


@pytest.mark.parametrize("file", FILES)
def test_a_folder_in_the_place_of_a_file_is_refused(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()
    refuses(folder, f"{file} is listed in the manifest and is not there as a file")


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_statistics_that_nobody_asks_for_are_not_looked_at(folder, damage):
    file = folder / STATISTICS_FILE
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "changed" else data[:-1])
    if damage == "missing":
        file.unlink()
    assert set(load_init(folder, statistics=False).manifest.files) == set(FILES)
    with pytest.raises(ArtifactError, match=STATISTICS_FILE):
        load_init(folder)


def test_the_rest_is_checked_without_statistics_too(folder):
    (folder / STATISTICS_FILE).unlink()
    (folder / "notes.txt").write_text("x")
    refuses(folder, "notes.txt is not listed in the manifest", statistics=False)
    (folder / "notes.txt").unlink()
    data = (folder / BASIS_FILE).read_bytes()
    (folder / BASIS_FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuses(folder, f"{BASIS_FILE} has another SHA-256", statistics=False)


# The manifest


def test_a_trainings_folder_says_where_its_initialisation_is(folder):
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "lora_da")
    refuses(run, f"Name another folder: the initialisation of this training is {run / 'lora_da'}.")
    refuses(folder, "one on the Hub is fetched by lora_da_hf.hub.pull_init")


def test_a_folder_without_a_manifest_is_refused(folder, tmp_path):
    (folder / MANIFEST_FILE).unlink()
    refuses(folder, "does not exist: this is not a LoRA-DA initialisation, or it is incomplete")
    refuses(tmp_path / "nowhere", "does not exist")


def test_a_link_in_the_place_of_the_manifest_is_refused(folder):
    (folder / MANIFEST_FILE).rename(folder.parent / "manifest")
    (folder / MANIFEST_FILE).symlink_to(folder.parent / "manifest")
    refuses(folder, "does not exist")


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_truncated_manifest_is_refused(folder, length):
    data = (folder / MANIFEST_FILE).read_bytes()
    (folder / MANIFEST_FILE).write_bytes(data[:length])
    refuses(folder, "is not valid JSON .*: truncated or changed. Fetch it again")


def test_a_manifest_that_lacks_its_last_line_break_is_refused(folder):
    data = (folder / MANIFEST_FILE).read_bytes()
    (folder / MANIFEST_FILE).write_bytes(data[:-1])
    refuses(folder, "was changed after it was written: its checksum is another")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"[" * 100_000, b'"text"', b"[]", b"null", b"{}"])
def test_what_is_no_manifest_at_all_is_refused(folder, data):
    (folder / MANIFEST_FILE).write_bytes(data)
    refuses(folder, "is not text|is not valid JSON|is not the manifest of a LoRA-DA initialisation")


def test_another_schema_version_is_refused_and_says_what_to_do(folder):
    change_manifest(folder, lambda values: values.update(schema_version=2))
    refuses(folder, "has schema version 2 and this version of lora_da_hf reads 1. Install the version that wrote it")


def test_another_kind_of_file_is_refused(folder):
    change_manifest(folder, lambda values: values.update(kind="something-else"))
    refuses(folder, "is not the manifest of a LoRA-DA initialisation")


def test_a_key_that_occurs_twice_in_the_manifest_is_refused(folder):
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"seed": 42', '"seed": 43,\n "seed": 42'))
    refuses(folder, "a key occurs twice")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_the_manifest_is_refused(folder, number):
    text = (folder / MANIFEST_FILE).read_text()
    assert '"step_size": 0.1,' in text
    (folder / MANIFEST_FILE).write_text(text.replace('"step_size": 0.1,', f'"step_size": {number},', 1))
    refuses(folder, f"{number} is no number")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("seed"), "expected the fields"),
        (lambda m: m.update(extra=1), "expected the fields"),
        (lambda m: m.update(seed="42"), "seed='42' is not"),
        (lambda m: m.update(seed=True), "seed=True is not"),
        (lambda m: m.update(step_size="0.1"), "step_size='0.1' is not"),
        (lambda m: m.update(layers=[]), "layers is missing or no mapping"),
        (lambda m: m.pop("files"), "files is missing or no mapping"),
        (lambda m: m.update(layers={}), "it lists no layer"),
        (lambda m: m["layers"][LAYER].pop("rank"), f"layer {LAYER}: expected the fields"),
        (lambda m: m["layers"].update({LAYER: 3}), f"layer {LAYER}: expected the fields"),
        (lambda m: m["layers"][LAYER].update(rank=0), f"sizes of layer {LAYER} contradict each other"),
        (lambda m: m["layers"][LAYER].update(rank=-1), f"sizes of layer {LAYER} contradict each other"),
        (lambda m: m["layers"][LAYER].update(rank=5), f"sizes of layer {LAYER} contradict each other"),
        (lambda m: m["layers"][LAYER].update(in_features=3), f"sizes of layer {LAYER} contradict each other"),
        (lambda m: m["layers"][LAYER].update(out_features=2**40), f"sizes of layer {LAYER} contradict each other"),
        (lambda m: m["layers"][LAYER].update(rank=2.0), "rank=2.0 is not"),
        (lambda m: m["layers"][LAYER].update(peft_scaling=-1.0), f"entry of layer {LAYER} is malformed"),
        (lambda m: m["layers"][LAYER].update(shares_input_with="elsewhere"), f"entry of layer {LAYER} is malformed"),
        (lambda m: m["files"].pop(BASIS_FILE), f"the files .*{BASIS_FILE}.* are not listed"),
        (lambda m: m["files"][BASIS_FILE].update(sha256="ab"), f"the entry of file '{BASIS_FILE}' is malformed"),
        (lambda m: m["files"][BASIS_FILE].update(size=-1), f"the entry of file '{BASIS_FILE}' is malformed"),
        (lambda m: m["files"].update({"../x": m["files"][BASIS_FILE]}), r"the entry of file '\.\./x' is malformed"),
        (lambda m: m["files"].update({"/etc/x": m["files"][BASIS_FILE]}), "the entry of file '/etc/x' is malformed"),
        (lambda m: m["files"].update({"..": m["files"][BASIS_FILE]}), r"the entry of file '\.\.' is malformed"),
        (lambda m: m["files"].pop(STATISTICS_FILE), "its checksum is another"),
        (
            lambda m: m["files"].update({STATISTICS_FILE.replace("00001-", "00002-"): m["files"].pop(STATISTICS_FILE)}),
            "the statistics are listed in part",
        ),
        (lambda m: m["layers"][LAYER].update(num_tokens=1), "shares the input of .*, and they contradict each other"),
        (lambda m: m["kept"].update({LAYER: "x"}), f"layer {LAYER} is both initialised and kept"),
        (lambda m: m["data"].update(more={}), "data holds more than plain facts"),
        (lambda m: m["data"].update(num_samples=-1), "a fingerprint or a count is malformed"),
        (lambda m: m.update(step_size_by_rank={"99": 0.1}), "the steps are malformed"),
        (lambda m: m.update(seed=-1), "seed -1 contradicts the settings"),
        (lambda m: m.update(versions={}), "the adapter's name or the version that wrote it is missing"),
        (lambda m: m.update(created="today"), "created='today' is no date"),
        (lambda m: m.update(step_size=0.2), "its checksum is another"),
        (lambda m: m.update(checksum="0" * 64), "its checksum is another"),
        (lambda m: m.pop("checksum"), "its checksum is another"),
        (lambda m: m["layers"][LAYER].update(peft_scaling=1.0), "its checksum is another"),
        (lambda m: m["base_model"].update(weights_sha256=None), "its checksum is another"),
    ],
)
def test_a_changed_manifest_is_refused(folder, change, message):
    change_manifest(folder, change)
    refuses(folder, message)


@pytest.mark.parametrize("file", [MANIFEST_FILE, "adapter_config.json", REPORT_FILE])
def test_json_that_is_longer_than_any_is_refused_before_it_is_parsed(folder, file):
    """Parsed, this one takes thirty times its length, which is within what any file of a repository may have."""
    content = b'{"layers":[' + b"{}," * (9 << 20) + b"{}]}"
    (folder / file).write_bytes(content)
    if file != MANIFEST_FILE:
        forge_manifest(folder)
    with measured_objects() as peak:
        refuses(folder, rf"{file} has {len(content):,} bytes, and at most [\d,]+ can be needed. Do not use it; ask who")
    assert peak[0] < 2 * len(content)


@contextlib.contextmanager
def measured_objects():
    """Count the memory of Python's objects that are made inside. Yields a list, which gets the peak in bytes."""
    peak = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_manifest_and_report_of_many_layers_with_many_directions_may_be_as_long_as_they_are(tmp_path):
    layers = tuple(f"model.layers.{n}.mlp.experts.gate_up_proj.base_layer[{k}]" for n in range(60) for k in range(100))
    manifest = make_manifest(layers)
    wide = {name: dataclasses.replace(layer, max_rank=48) for name, layer in manifest.layers.items()}
    manifest = dataclasses.replace(manifest, layers=wide, kept={f"{name} besides": "it has no tokens" for name in wide})
    assert len(manifest.to_json()) < MAX_MANIFEST_BYTES / 5
    report = make_report(layers, kept=manifest.report.kept)
    numbers = [-1.2345678901234567e-08] * 48
    for layer in report.layers:
        layer.eigenvalues, layer.basis_A_sums, layer.basis_B_sums = numbers, numbers, numbers
    report.save(tmp_path / REPORT_FILE)
    assert len(read_report(tmp_path / REPORT_FILE, manifest).layers) == 6000


# Tensors, with a manifest that agrees on sizes and hashes


@pytest.mark.parametrize("file", [BASIS_FILE, ADAPTER_FILE])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_even_with_the_right_hash(folder, file, value):
    key = f"{LAYER}.basis_A" if file == BASIS_FILE else f"base_model.model.{LAYER}.lora_B.weight"
    change_tensors(folder / file, lambda tensors: tensors[key][1, 1].fill_(value))
    forge_manifest(folder)
    refuses(folder, "holds NaN or infinity. Do not use it; compute it again")


def test_statistics_that_are_not_finite_are_refused_when_they_are_read(folder):
    change_tensors(folder / STATISTICS_FILE, lambda tensors: tensors[f"{LAYER}.weight_grad"][0, 0].fill_(float("nan")))
    forge_manifest(folder)
    stored = load_init(folder)
    with pytest.raises(ArtifactError, match="weight_grad holds NaN or infinity"):
        load_statistics(stored.folder, stored.manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.basis_B"), "and the manifest disagree on the tensors in it"),
        (lambda t: t.update(more=torch.zeros(1)), "and the manifest disagree on the tensors in it"),
        (
            lambda t: t.update({f"{LAYER}.basis_A": t[f"{LAYER}.basis_A"].double()}),
            r"basis_A is F64 \[4, 48\], not F32 \[4, 48\] as the manifest says",
        ),
        (
            lambda t: t.update({f"{LAYER}.basis_A": t[f"{LAYER}.basis_A"][:2].clone()}),
            r"basis_A is F32 \[2, 48\], not F32 \[4, 48\] as the manifest says",
        ),
    ],
)
def test_another_basis_than_the_manifest_announces_is_refused(folder, change, message):
    change_tensors(folder / BASIS_FILE, change)
    forge_manifest(folder)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"base_model.model.{LAYER}.lora_A.weight"), "is missing"),
        (
            lambda t: t.update({f"base_model.model.{LAYER}.lora_A.weight": torch.zeros(3, 48)}),
            r"is \[3, 48\], not \[4, 48\]",
        ),
    ],
)
def test_another_adapter_than_the_manifest_announces_is_refused(folder, change, message):
    change_tensors(folder / ADAPTER_FILE, change)
    forge_manifest(folder)
    refuses(folder, f"lora_A of {LAYER} {message}")


def test_a_basis_with_a_row_of_zeros_is_refused(tmp_path, lora_model):
    folder = store_init(tmp_path / "init", lora_model(), projected_rms=1.0, save_statistics=False)
    change_tensors(folder / BASIS_FILE, lambda tensors: tensors[f"{LAYER}.basis_A"][0].zero_())
    forge_manifest(folder)
    refuses(folder, f"the rows of basis_A of {LAYER} are not orthonormal")


def test_a_step_that_moves_a_layer_further_than_by_its_length_is_refused(folder):
    def stretch(tensors):
        tensors.update({key: 3 * tensor for key, tensor in tensors.items() if key.endswith(".basis_B")})

    change_tensors(folder / BASIS_FILE, stretch)
    forge_manifest(folder)
    refuses(folder, "one step moves .* by a spectral norm above 1. Fetch it again.")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter_config.json", {"r": 3}, "has rank 3 and alpha 16, the manifest says 4"),
        ("adapter_config.json", {"r": 0}, "r=0 is no rank"),
        ("adapter_config.json", {"lora_alpha": -1}, "has scaling -0.25, the manifest says 4"),
        ("adapter_config.json", {"rank_pattern": {"ghost": True}}, "rank_pattern.'ghost'.='True' is no number"),
        ("adapter_config.json", {"alpha_pattern": {"ghost": "x"}}, "alpha_pattern.'ghost'.='x' is no number"),
        ("adapter_config.json", {"lora_alpha": 8}, "has scaling 2.0, the manifest says 4"),
        (REPORT_FILE, {"num_samples": 3}, "contradicts the manifest or the basis: num_samples is '3' there"),
    ],
)
def test_an_adapter_s_config_or_a_report_that_contradicts_the_manifest_is_refused(folder, file, change, message):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    forge_manifest(folder)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(key), "DoRA's magnitude of .* is missing or of another size"),
        (lambda t, key: t.update({key: t[key][:3].clone()}), "DoRA's magnitude of .* is missing or of another size"),
        (lambda t, key: t[key][5].mul_(-1), "is not positive"),
    ],
)
def test_a_magnitude_that_cannot_be_is_refused(tmp_path, lora_model, change, message):
    folder = store_init(
        tmp_path / "init", lora_model(target_modules=["q_proj"], use_dora=True), save_statistics=False, step_size=0.1
    )
    key = f"base_model.model.{LAYER}.lora_magnitude_vector"
    change_tensors(folder / ADAPTER_FILE, lambda tensors: change(tensors, key))
    forge_manifest(folder)
    refuses(folder, message)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": -1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}'])
def test_a_config_of_a_checkpoint_that_cannot_be_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=re.escape("Go on from another checkpoint.")):
        read_of_checkpoint(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(("layer_steps", "unit"), [("displacement", 1.0), ("equal", 2.0), ("displacement", -1.0)])
def test_a_unit_that_is_not_that_of_the_norms_is_refused(tmp_path, lora_model, layer_steps, unit):
    folder = store_init(tmp_path / "init", lora_model(), layer_steps=layer_steps)
    load_init(folder)
    report = json.loads((folder / REPORT_FILE).read_text())
    (folder / REPORT_FILE).write_text(json.dumps({**report, "step_unit": unit}))
    forge_manifest(folder)
    refuses(folder, f"the unit of steps, {unit:g}, is not that of the norms there. Fetch it again.")


@pytest.mark.parametrize("norms", [[0.0], [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.0]])
def test_a_displacement_without_a_length_is_refused(folder, norms):
    report = json.loads((folder / REPORT_FILE).read_text())
    for layer, norm in zip(report["layers"], norms, strict=False):
        layer["displacement_norm"] = norm
    (folder / REPORT_FILE).write_text(json.dumps(report))
    forge_manifest(folder)
    refuses(folder, "the norm of a displacement is not above 0|is not that of the norms there")


@pytest.mark.parametrize("changes", [{"max_rank": 3, "rank": 3}, {"out_features": 47}, {"in_features": 49}])
def test_other_shapes_in_the_manifest_than_in_the_files_are_refused(folder, changes):
    layers = load_init(folder).manifest.layers
    layers = {name: dataclasses.replace(layer, **changes) for name, layer in layers.items()}
    forge_manifest(folder, layers=layers)
    refuses(folder, "as the manifest says")


def rewrite_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


@pytest.mark.parametrize("file", [BASIS_FILE, ADAPTER_FILE])
def test_a_tensor_that_occurs_twice_in_a_header_is_refused(folder, file):
    def twice(header):
        first = header.index(b'"', header.index(b"}"))  # after the metadata
        entry = header[first : header.index(b"}", first) + 1]
        return header.rstrip()[:-1] + b"," + entry + b"}"

    rewrite_header(folder / file, twice)
    forge_manifest(folder)
    refuses(folder, "a tensor's name occurs twice in the header")


@pytest.mark.parametrize(
    "data",
    [b"", b"short", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 3) + b"{x}", struct.pack("<Q", 2) + b"{}x"],
)
def test_what_is_no_safetensors_file_is_refused(folder, data):
    (folder / BASIS_FILE).write_bytes(data)
    forge_manifest(folder)
    refuses(folder, "is not a valid safetensors file|disagree on the tensors")


SLOW = "(.*.*)*" * 20 + "!"
"""A regular expression that takes for ever on any name."""


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"modules_to_save": [SLOW]},
        {"layers_to_transform": [0], "layers_pattern": [SLOW]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_regular_expression_from_outside_is_run(folder, change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    forge_manifest(folder)
    refuses(folder, "holds .*, where a stored initialisation has names of modules. Do not use it")


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\..*": 2, "q_proj": 3},
            "alpha_pattern": {"self_attn.v_proj": 5},
        },
    ],
    ids=["targets", "excluded", "layers", "ranks"],
)
def test_an_adapter_that_peft_matched_by_patterns_is_stored_by_names(tmp_path, tiny_llama, lora_model, lora):
    model = lora_model(**lora)
    expected = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    stored = load_init(store_init(tmp_path / "init", model, save_statistics=False))
    assert len(stored.manifest.layers) == len(expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "init")
    found = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == expected
    assert_same_tensors(adapter_weights(loaded), adapter_weights(model))


@pytest.mark.parametrize(
    ("library", "accepted"),
    [
        ("transformers", True),
        ("transformers.models.llama.modeling_llama", True),
        ("a_module_beside", False),
        ("os", False),
        ("transformers_modules.org.model", False),
        ("transformers.", False),
    ],
)
def test_no_module_but_transformers_is_named_for_peft_to_import(folder, library, accepted):
    path = folder / "adapter_config.json"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": library}
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None, "auto_mapping": mapping}))
    forge_manifest(folder)
    if accepted:
        load_init(folder)
    else:
        refuses(folder, f"'{library}'.*, from which PEFT would import other code than transformers. Do not use it")


def test_an_adapter_of_a_class_of_ones_own_is_stored_without_naming_it(tmp_path, tiny_llama, lora_model):
    class OwnLlama(LlamaForCausalLM):
        pass

    adapted = lora_model(model=OwnLlama(tiny_llama().config))
    stored = load_init(store_init(tmp_path / "init", adapted, save_statistics=False))
    assert json.loads((stored.folder / "adapter_config.json").read_text())["auto_mapping"] is None
    loaded = PeftModel.from_pretrained(OwnLlama(tiny_llama().config), stored.folder)
    assert_same_tensors(adapter_weights(loaded), adapter_weights(adapted))


def test_a_pickle_is_refused_and_not_run(folder, tmp_path):
    torch.save({"basis": torch.zeros(2)}, folder / BASIS_FILE)
    forge_manifest(folder)
    refuses(folder, "is not a valid safetensors file")
    with pytest.raises(ArtifactError, match="is not a valid safetensors file"):
        read_tensors(folder / BASIS_FILE, None)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_is_refused(original, tmp_path_factory, data):
    file = data.draw(st.sampled_from([MANIFEST_FILE, *FILES]))
    content = bytearray((original / file).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    folder = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in original.iterdir():
        if path.name == file:
            (folder / file).write_bytes(content)
        else:
            (folder / path.name).hardlink_to(path)
    with pytest.raises(ArtifactError):
        load_init(folder)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 2**20), mask=st.integers(1, 255))
def test_a_changed_byte_of_a_file_whose_hash_was_forged_is_refused_or_leaves_finite_tensors(
    original, tmp_path_factory, place, mask
):
    folder = tmp_path_factory.getbasetemp() / "forged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    content = bytearray((folder / BASIS_FILE).read_bytes())
    content[place % min(len(content), 1200)] ^= mask  # the header and the first numbers
    (folder / BASIS_FILE).write_bytes(content)
    forge_manifest(folder)
    try:
        bases = load_init(folder).bases
    except ArtifactError:
        return
    assert all(basis.basis_A.isfinite().all() and basis.basis_B.isfinite().all() for basis in bases.values())


# The base


def facts(model):
    return base_model_facts(model)


def test_the_base_that_it_was_computed_for_is_accepted(folder, lora_model):
    load_init(folder, base_model=facts(lora_model(target_modules=["q_proj", "v_proj"])))


def test_a_bfloat16_copy_of_the_base_is_accepted(folder, lora_model, tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    load_init(folder, base_model=facts(lora_model(model=model, target_modules=["q_proj", "v_proj"])))


def test_a_base_of_another_shape_is_refused_with_the_difference(folder, lora_model, tiny_llama):
    model = lora_model(model=tiny_llama(num_key_value_heads=1), target_modules=["q_proj", "v_proj"])
    refuses(
        folder,
        "the model differs: num_key_value_heads is 1 and was 2. Use that base, or compute an initialisation",
        BaseModelMismatchError,
        base_model=facts(model),
    )


def test_a_base_of_another_vocabulary_is_refused_with_the_difference(folder, tiny_llama):
    model = tiny_llama(vocab_size=128)
    refuses(folder, "vocab_size is 128 and was 96", BaseModelMismatchError, base_model=facts(model))
    stored = load_init(folder).manifest.base_model
    config = {name: value for name, value in stored["config"].items() if name != "vocab_size"}  # an earlier version's
    forge_manifest(folder, base_model={**stored, "config": config})
    refuses(folder, r"load it in float32 or bfloat16", BaseModelMismatchError, base_model=facts(model))


def test_a_base_with_other_weights_is_refused(folder, lora_model, tiny_llama):
    model = lora_model(model=tiny_llama(seed=1), target_modules=["q_proj", "v_proj"])
    refuses(folder, "its weights have another fingerprint", BaseModelMismatchError, base_model=facts(model))


def test_a_fine_tuned_base_is_refused(folder, lora_model, tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.05)
    found = facts(lora_model(model=model, target_modules=["q_proj", "v_proj"]))
    refuses(folder, "its weights have another fingerprint", BaseModelMismatchError, base_model=found)


def test_another_base_is_an_artifact_error_too():
    assert issubclass(BaseModelMismatchError, ArtifactError)
