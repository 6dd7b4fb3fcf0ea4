"""Generated corruptions of a stored initialisation: every one is refused with an error of this library."""

import copy
import functools
import hashlib
import json
import pickle
import shutil
import struct

import pytest
import torch
from conftest import make_lora_model, make_tiny_llama
from harness import (
    BASE_NAME,
    change_tensors,
    collate_classes,
    make_config,
    make_init,
    make_learnable_samples,
    store_init,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.folders import atomic_folder, check_replaceable
from lora_da_hf.artifacts.manifest import ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASIS_FILE, MANIFEST_FILE, REPORT_FILE
from lora_da_hf.artifacts.store import file_entry, load_init
from lora_da_hf.errors import ArtifactError, ConfigError, LoRADAError
from lora_da_hf.pipeline.against_base import check_against_base
from lora_da_hf.pipeline.base_model import base_model_facts

STATISTICS_FILE = "lora_da_statistics-00001-of-00001.safetensors"
FILES = [MANIFEST_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, BASIS_FILE, REPORT_FILE, STATISTICS_FILE]
TENSOR_FILES = [ADAPTER_FILE, BASIS_FILE, STATISTICS_FILE]
LAYER = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .default.. . LoRA tensor")
many = settings(max_examples=550, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_init(tmp_path_factory.mktemp("original") / "init", max_rank=6)


@pytest.fixture(scope="module")
def base():
    return base_model_facts(make_tiny_llama(name_or_path=BASE_NAME))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("corrupt")


def fresh_copy(original, place):
    shutil.rmtree(place)
    place.mkdir()
    return shutil.copytree(original, place / "init")


def contents(folder):
    return {path.name: None if path.is_symlink() or path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def use(folder, base):
    """Do what anybody does who uses an initialisation."""


def test_what_is_not_corrupt_is_accepted(original, base):
    use(original, base)


# Bytes: the manifest knows better


def flip(data, draw):
    place = draw(st.integers(0, len(data) - 1))
    return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]


def truncate(data, draw):
    return data[: draw(st.integers(0, len(data) - 1))]


def extend(data, draw):
    return data + draw(st.binary(min_size=1, max_size=64))


def insert(data, draw):
    place = draw(st.integers(0, len(data)))
    return data[:place] + draw(st.binary(min_size=1, max_size=64)) + data[place:]


def zero(data, draw):
    start = draw(st.integers(0, len(data) - 1))
    length = draw(st.integers(1, 64))
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def replace(data, draw):
    return draw(st.sampled_from([b"", b"{}", b"[]", b"null", pickle.dumps({"a": 1}), b"\xff\xfe", b"[" * 5000]))


def swap_halves(data, draw):
    middle = draw(st.integers(1, len(data) - 1))
    return data[middle:] + data[:middle]


@many
@given(st.data())
def test_other_bytes_are_refused(original, base, place, data):
    folder = fresh_copy(original, place)
    path = folder / data.draw(st.sampled_from(FILES))
    change = data.draw(st.sampled_from([flip, truncate, extend, insert, zero, replace, swap_halves]))
    changed = change(path.read_bytes(), data.draw)
    assume(changed != path.read_bytes())
    path.write_bytes(changed)
    with pytest.raises(LoRADAError):
        use(folder, base)


# Meaning: sizes, hashes and the manifest's checksum are those of what is there


def forge(folder, change=lambda values: None):
    """Write a manifest whose hashes are right, and whose values are whatever a change makes of them."""
    values = json.loads((folder / MANIFEST_FILE).read_text())
    for name in list(values["files"]):
        if (folder / name).is_file():
            entry = file_entry(folder / name)
            values["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    change(values)
    values.pop("checksum", None)
    values["checksum"] = hashlib.sha256(text_of(values).encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(text_of(values))


def text_of(values):
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def entry_of(tensor, draw):
    return tuple(draw(st.integers(0, size - 1)) for size in tensor.shape)


def far(draw):
    return draw(st.floats(0.5, 1e6)) * draw(st.sampled_from([-1, 1]))


def not_finite(folder, draw):
    def change(tensors):
        tensor = tensors[draw(st.sampled_from(sorted(tensors)))]
        tensor[entry_of(tensor, draw)] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))

    change_tensors(folder / draw(st.sampled_from(TENSOR_FILES)), change)
    forge(folder)


def moved_entry(folder, draw):
    """Move one number so far that it is no rounding."""

    def change(tensors):
        tensor = tensors[draw(st.sampled_from(sorted(tensors)))]
        tensor[entry_of(tensor, draw)] += far(draw)

    change_tensors(folder / draw(st.sampled_from(TENSOR_FILES)), change)
    forge(folder)


def scaled_tensor(folder, draw):
    def change(tensors):
        tensors[draw(st.sampled_from(sorted(tensors)))] *= draw(st.sampled_from([0.0, 0.5, -1.0, 1.01, 2.0, 1e9]))

    change_tensors(folder / draw(st.sampled_from(TENSOR_FILES)), change)
    forge(folder)


def exchanged_rows(folder, draw):
    def change(tensors):
        tensor = tensors[draw(st.sampled_from(sorted(tensors)))]
        first, second = draw(st.lists(st.integers(0, len(tensor) - 1), min_size=2, max_size=2, unique=True))
        tensor[[first, second]] = tensor[[second, first]]

    change_tensors(folder / draw(st.sampled_from([ADAPTER_FILE, BASIS_FILE])), change)
    forge(folder)


def turned_direction(folder, draw):
    """Change the sign of one direction in one of the two parts of a basis, beyond the adapter's rank too."""

    def change(tensors):
        name = draw(st.sampled_from(sorted(name for name in tensors if "basis_" in name)))
        directions = tensors[name] if "basis_A" in name else tensors[name].mT
        directions[draw(st.integers(0, len(directions) - 1))] *= -1

    change_tensors(folder / BASIS_FILE, change)
    forge(folder)


def exchanged_tensors(folder, draw):
    def change(tensors):
        first, second = draw(st.lists(st.sampled_from(sorted(tensors)), min_size=2, max_size=2, unique=True))
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    change_tensors(folder / draw(st.sampled_from(TENSOR_FILES)), change)
    forge(folder)


def impossible_statistics(folder, draw):
    def change(tensors):
        name = draw(st.sampled_from(sorted(name for name in tensors if "weight_grad" not in name)))
        tensor = tensors[name]
        if "output" in name:
            tensor[entry_of(tensor, draw)] = -draw(st.floats(1e-6, 1e6))
            return
        column = draw(st.integers(1, 47))
        tensor[column] = tensor[0] * draw(st.floats(1e6, 1e9))  # above what the diagonal allows
        if draw(st.booleans()):
            tensor[0] = -draw(st.floats(1e-6, 1e6))

    change_tensors(folder / STATISTICS_FILE, change)
    forge(folder)


def other_gradient(folder, draw):
    """Put another gradient in the place of a layer's: of the same size, its rows or columns shuffled, or smoothed."""

    def change(tensors):
        name = draw(st.sampled_from(sorted(name for name in tensors if "weight_grad" in name)))
        gradient = tensors[name]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        other = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        what = draw(st.sampled_from(["other", "mixed", "negative", "rows", "columns", "low rank"]))
        if what == "other":
            tensors[name] = other * (gradient.norm() / other.norm())
        if what == "mixed":
            tensors[name] = gradient + other * (0.01 * gradient.norm() / other.norm())
        if what == "negative":
            tensors[name] = -gradient
        if what == "rows":
            tensors[name] = gradient[torch.randperm(len(gradient), generator=generator)]
        if what == "columns":
            tensors[name] = gradient[:, torch.randperm(gradient.shape[1], generator=generator)].contiguous()
        if what == "low rank":
            left, singular, right = torch.linalg.svd(gradient, full_matrices=False)
            tensors[name] = (left[:, :3] * singular[:3] @ right[:3]).contiguous()

    change_tensors(folder / STATISTICS_FILE, change)
    forge(folder)


def other_tensors(folder, draw):
    """Leave out, rename, add, cut, transpose or retype a tensor."""

    def change(tensors):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        what = draw(st.sampled_from(["drop", "rename", "add", "cut", "grow", "flatten", "dtype"]))
        if what in ("drop", "rename"):
            del tensors[name]
        if what in ("rename", "add"):
            prefix = draw(st.sampled_from(["", "base_model.model.", "base_model.model.model."]))
            added = draw(st.sampled_from(["x", "lm_head.weight", "layers.0.mlp.up_proj.weight", "é"]))
            tensors[prefix + added] = tensor.clone()
        if what == "cut":
            tensors[name] = tensor[:-1].clone()
        if what == "grow":
            tensors[name] = torch.cat([tensor, tensor[:1]])
        if what == "flatten":
            tensors[name] = tensor.reshape(1, -1).clone()
        if what == "dtype":
            kinds = [torch.int32, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]
            tensors[name] = tensor.to(draw(st.sampled_from(kinds)))

    change_tensors(folder / draw(st.sampled_from(TENSOR_FILES)), change)
    forge(folder)


def keep_base_weight(folder, name):
    """Add a base weight to the adapter, and list its whole name among the layers that keep PEFT's initialisation."""
    report = json.loads((folder / REPORT_FILE).read_text())
    report["kept"][name] = "so"
    (folder / REPORT_FILE).write_text(json.dumps(report))
    change_tensors(folder / ADAPTER_FILE, lambda t: t.update({f"base_model.model.{name}": torch.zeros(80, 48)}))
    forge(folder, lambda values: values["kept"].update({name: "so"}))


def kept_base_weight(folder, draw):
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", f"{LAYER}.weight", "x"]
    keep_base_weight(folder, draw(st.sampled_from(names)))


def tensor_beside(folder, draw):
    """Add a tensor of another layer's adapter, a bias, a magnitude or rows of tokens, with a word for it or without."""
    name = draw(st.sampled_from(["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", LAYER, "x"]))
    ends = ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias"]
    end = draw(st.sampled_from([*ends, "lora_magnitude_vector", "token_adapter.trainable_tokens_delta", "bias"]))
    key = f"base_model.model.{name}.{end}"
    said = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}.get(end)
    value = torch.full(draw(st.sampled_from([(4, 48), (48, 4), (3, 3), (48,)])), draw(st.sampled_from([9.0, -1.0])))
    tensors = load_file(folder / ADAPTER_FILE)
    assume(key not in tensors)
    change_tensors(folder / ADAPTER_FILE, lambda tensors: tensors.update({key: value}))
    if said is not None:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
        (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({**config, said: True}))
    if draw(st.booleans()) and name != LAYER:
        report = json.loads((folder / REPORT_FILE).read_text())
        report["kept"][name] = "so"
        (folder / REPORT_FILE).write_text(json.dumps(report))
        forge(folder, lambda values: values["kept"].update({name: "so"}))
    else:
        forge(folder)


def other_header(folder, draw):
    path = folder / draw(st.sampled_from(TENSOR_FILES))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[name]
    what = draw(st.sampled_from(["shape", "dtype", "offsets", "twice", "length", "text", "deep", "extra"]))
    if what == "shape":
        entry["shape"] = draw(st.sampled_from([[], [-1], [2**62, 8], [1.5], None, "x"]))
    if what == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "X", "", 3, None, "BF16"]))
    if what == "offsets":
        entry["data_offsets"] = draw(st.sampled_from([[0, 0], [1, 9], [-4, 0], [0, 2**62], [], None, [8, 0]]))
    if what == "extra":
        header["x"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(rest), len(rest)]}
    text = json.dumps(header).encode()
    if what == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    if what == "text":
        text = draw(st.sampled_from([b"", b"{", b"[]", b"null", b"{}", b"\xff" * 9, b'{"a": 1}', b"NaN", text[:-1]]))
    if what == "deep":
        text = b'{"__metadata__": ' + b"[" * 3000 + b"]" * 3000 + b"," + text[1:]
    stated = draw(st.sampled_from([0, 1, 2**20, 2**62, 2**64 - 1])) if what == "length" else len(text)
    path.write_bytes(struct.pack("<Q", stated) + text + rest)
    forge(folder)


def leaves(values, path=()):
    """Yield the paths of what is no container, or an empty one."""
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    if not children or not values:
        yield path
    for key, value in children:
        yield from leaves(value, (*path, key))


def at(values, path):
    for key in path:
        values = values[key]
    return values


def put(values, path, value):
    at(values, path[:-1])[path[-1]] = value


def wrong_type(value, draw):
    """Return what no field takes in the place of a value."""
    if isinstance(value, (dict, list)):
        return draw(st.sampled_from([3, "x", True, None, 1.5]))
    return draw(st.sampled_from([{"x": [1]}, [[1]], {"": None}, [None]]))


def other_value(value, draw):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([value + 1, value - 1, -value - 1, 0, 2**40, 2**70]))
    if isinstance(value, float):
        return draw(st.sampled_from([value + 1.0, value * 1.5, -value - 1.0, 1e300]))
    return draw(st.sampled_from([f"{value}x", "", "\x1b[31m", "x" * 5000, "\ud800"]))


def checked_in_manifest(path):
    """Tell whether another value of the same type contradicts another file, the base or a range."""
    if path[:2] == ("data", "identity") and path[-1].startswith("loss"):  # which a later run compares with its own
        return False
    sections = ("layers", "config", "data", "step_size", "step_size_by_rank", "schema_version", "kind", "kept")
    return path[0] in sections or path[:2] in (
        ("base_model", "weights_sha256"),
        ("base_model", "name_or_path"),
        ("base_model", "config"),
    )


def contradicting_manifest(folder, draw):
    def change(values):
        paths = [path for path in leaves(values) if checked_in_manifest(path) and at(values, path) is not None]
        path = draw(st.sampled_from([path for path in paths if not isinstance(at(values, path), (dict, list))]))
        put(values, path, other_value(at(values, path), draw))

    forge(folder, change)


def mistyped_manifest(folder, draw):
    def change(values):
        path = draw(st.sampled_from([path for path in leaves(values) if path != ("checksum",)]))
        put(values, path, wrong_type(at(values, path), draw))

    forge(folder, change)


def incomplete_manifest(folder, draw):
    """Leave a key out, add one that means something, or rename one."""

    def change(values):
        paths = [
            p
            for p in leaves(values)
            if p[0] not in ("versions", "checksum")
            and p[:2] != ("base_model", "config")
            and not p[-1].startswith("loss of ")  # of which there are as many as were measured
        ]
        path = draw(st.sampled_from(paths))
        path = path[: draw(st.integers(1, len(path)))]
        value = at(values, path[:-1]).pop(path[-1])
        if draw(st.booleans()):
            at(values, path[:-1])[draw(st.sampled_from(["x", "", "0", "-1", "007", "../x", "\x1b[31m", "\ud800"]))] = (
                value
            )

    forge(folder, change)


def senseless_manifest(folder, draw):
    changes = {
        "created": ["", "yesterday", "2026-13-40"],
        "seed": [-1, 2**63, 2**80],
        "adapter_name": ["", "\x1b[31m"],
        "versions": [{}, {"torch": "2"}, {"lora_da_hf": "\x00"}],
        "step_size": [-0.1, 1e400, 2.0, None, 0.0],
        "step_size_by_rank": [{"0": 0.1}, {"99": 0.1}, {"x": 0.1}, {"-1": 0.1}, {"01": 0.1}, {"1": -0.1}, {"1": 1e400}],
        "kept": [{LAYER: "it is both"}, {"x": "\x1b[31m"}, {"lm_head": "not so in the report"}],
        "layers": [{}],
        "schema_version": [0, 2, "1", 1.5, None],
    }
    name = draw(st.sampled_from(sorted(changes)))
    value = draw(st.sampled_from(changes[name]))
    forge(folder, lambda values: values.update({name: copy.deepcopy(value)}))


def unlisted_or_odd_files(folder, draw):
    name = draw(
        st.sampled_from(
            [
                "adapter_model.bin",
                "modeling.py",
                "..",
                "../x",
                "/etc/passwd",
                "a/b",
                "a\\b",
                "lora_da_statistics-00002-of-00002.safetensors",
                "lora_da_statistics-00001-of-00002.safetensors",
                "C:x",
                ".hidden",
                "con\x00",
                "README.md",
            ]
        )
    )
    plain = "/" not in name and "\x00" not in name and name != ".."
    listed = not plain or name == "README.md" or draw(st.booleans())
    if plain:
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
    entry = {"size": 4, "sha256": "0" * 64}
    if plain and listed:
        found = file_entry(folder / name)
        entry = {"size": found.size, "sha256": found.sha256}
    forge(folder, lambda values: values["files"].update({name: entry} if listed else {}))


def no_plain_file(folder, draw):
    path = folder / draw(st.sampled_from(FILES))
    forge(folder)
    moved = folder.parent / path.name
    path.rename(moved)
    what = draw(st.sampled_from(["link", "folder", "nothing", "dangling"]))
    if what == "folder":
        path.mkdir()
    elif what != "nothing":
        path.symlink_to(moved if what == "link" else folder.parent / "nowhere")


def other_file(folder, draw):
    """Put another file, a pickle or nothing in the place of one, with its hash."""
    names = [name for name in FILES if name != MANIFEST_FILE]
    first, second = draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    choices = [(folder / second).read_bytes(), b"", pickle.dumps({"a": 1}), b"\x80\x04.", b"PK\x03\x04" + bytes(200)]
    (folder / first).write_bytes(draw(st.sampled_from(choices)))
    forge(folder)


def changed_json(name, change):
    def corrupt(folder, draw):
        values = json.loads((folder / name).read_text())
        change(values, draw)
        (folder / name).write_text(json.dumps(values))
        forge(folder)

    corrupt.__name__ = change.__name__
    return corrupt


def mistyped_report(values, draw):
    path = draw(st.sampled_from(list(leaves(values))))
    put(values, path, wrong_type(at(values, path), draw))


def incomplete_report(values, draw):
    """Leave out what has no default, or another one than what is stored."""
    paths = [path for path in leaves(values) if path[0] in SAID_TWICE and "notes" not in path]
    path = draw(st.sampled_from(paths))
    path = path[: draw(st.integers(1, len(path)))]
    at(values, path[:-1]).pop(path[-1])


SAID_TWICE = ("layers", "config", "step_unit", "step_size", "data_fingerprint", "num_samples", "population_size")
FREE = ("notes", "solver", "residual", "loss_reduction", "batch_size", "artifact")


def contradicting_report(values, draw):
    sections = ("layers", "config", "step_unit", "step_size", "step_size_by_rank", "data_fingerprint", "num_samples")
    paths = [p for p in leaves(values) if p[0] in (*sections, "population_size") and not set(p) & set(FREE)]
    paths = [path for path in paths if isinstance(at(values, path), (int, float, str))]
    path = draw(st.sampled_from(paths))
    changed = other_value(at(values, path), draw)
    assume(changed != at(values, path))
    put(values, path, changed)


def senseless_report(values, draw):
    changes = {
        "seconds": [{"solve": -1.0}, {"solve": 1e400}],
        "num_unseen_samples": [-1],
        "batch_size": [0, -3],
        "search_loss_before": [1e400],
        "search": [[[0.1]], [[None, 1.0]]],
        "layers": [[], [3]],
        "kept": [{"lm_head": "not so in the manifest"}],
        "notes": ["x", [3], ["\x1b[31m"]],
    }
    name = draw(st.sampled_from(sorted(changes)))
    values[name] = draw(st.sampled_from(changes[name]))


CONFIG_CHANGES = {
    "peft_type": ["LOHA", None, 3, ["LORA"]],
    "r": [3, 5, 0, -4, "4", None, 4.5, 2**70],
    "lora_alpha": [8, 0, -16, "16", None, 1e400, 2**70],
    "rank_pattern": [{"q_proj": 3}, {"q_proj": "4"}, {"(": 4}, [4], {LAYER: 0}, {"v_proj": None}],
    "alpha_pattern": [{"v_proj": 8}, {"v_proj": "x"}, {"v_proj": 2**2000}, {"[": 4}, "x"],
    "use_rslora": [True, "yes", 1],
    "use_dora": [True],
    "use_qalora": [True],
    "target_modules": [
        ["q_proj"],
        ["q_proj", "v_proj", "up_proj"],
        [],
        None,
        "x",
        "(",
        ".*mlp.*",
        [3],
        {"q_proj": 1},
        "all-linear",
    ],
    "exclude_modules": [["v_proj"], ".*q_proj", "(", 3],
    "modules_to_save": [["q_proj"], "q_proj", [3], ["("]],
    "layers_to_transform": [[0], 1, "0"],
    "init_lora_weights": [False, "pissa", "olora", "corda", "loftq", "pissa_niter_4", None, 3],
    "megatron_config": [{"a": 1}],
    "corda_config": [{"cache_file": "/tmp/x"}],
    "loftq_config": [{"loftq_bits": 4}],
    "layer_replication": [[[0, 1]], "x"],
    "lora_dropout": [-0.1, 1.0, 2, "0", None, 1e400],
    "auto_mapping": [
        {"base_model_class": "os; x", "parent_library": "os"},
        {"x": "os"},
        {"base_model_class": "LlamaForCausalLM", "parent_library": "os"},
        {"parent_library": "a/b"},
        "os",
    ],
    "base_model_name_or_path": ["org/other", 3, "\x1b[31m"],
    "trust_remote_code": [True, "yes"],
    "custom_module": ["evil.py"],
    "inference_mode": ["yes", 3],
    "bias": ["some", 3],
    "task_type": [3, ["CAUSAL_LM"]],
}


def other_adapter_config(values, draw):
    name = draw(st.sampled_from(sorted(CONFIG_CHANGES)))
    values[name] = draw(st.sampled_from(CONFIG_CHANGES[name]))


def broken_json(folder, draw):
    path = folder / draw(st.sampled_from([ADAPTER_CONFIG_FILE, REPORT_FILE]))
    text = path.read_text()
    key = json.dumps(sorted(json.loads(text))[0])
    choices = [
        text[: len(text) // 2],
        text.replace(key, f'{key}: null, "x": NaN, {key}', 1),
        text.replace("{", f"{{{key}: null,", 1),
        text.replace("{", '{"\\ud800": null,', 1),
        text.replace("{", '{"x": ' + "[" * 3000 + "]" * 3000 + ",", 1),
        text.replace("{", '{"x": ' + "9" * 6000 + ",", 1),
        f"[{text}]",
        "null",
        "",
        "\ufeff" + text,
    ]
    path.write_text(draw(st.sampled_from(choices)), encoding="utf-8")
    forge(folder)


CORRUPTIONS = [
    not_finite,
    moved_entry,
    scaled_tensor,
    exchanged_rows,
    exchanged_tensors,
    impossible_statistics,
    other_gradient,
    other_tensors,
    kept_base_weight,
    tensor_beside,
    turned_direction,
    other_header,
    contradicting_manifest,
    mistyped_manifest,
    incomplete_manifest,
    senseless_manifest,
    unlisted_or_odd_files,
    no_plain_file,
    other_file,
    changed_json(REPORT_FILE, mistyped_report),
    changed_json(REPORT_FILE, incomplete_report),
    changed_json(REPORT_FILE, contradicting_report),
    changed_json(REPORT_FILE, senseless_report),
    changed_json(ADAPTER_CONFIG_FILE, other_adapter_config),
    broken_json,
]


@many
@given(corrupt=st.sampled_from(CORRUPTIONS), data=st.data())
def test_another_meaning_is_refused_with_every_hash_right(original, base, place, corrupt, data):
    folder = fresh_copy(original, place)
    before = contents(folder)
    corrupt(folder, data.draw)
    assume(contents(folder) != before)
    with pytest.raises(LoRADAError):
        use(folder, base)


# One by one


def test_a_header_of_99_megabytes_is_not_parsed(original, place):
    folder = fresh_copy(original, place)
    data = (folder / BASIS_FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length] + b" " * (99 << 20)
    (folder / BASIS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    forge(folder)
    with pytest.raises(ArtifactError, match=r"its header has \d+ bytes, and 12 tensors need \d+ at most"):
        load_init(folder)


def test_a_base_weight_in_the_adapter_is_refused(original, place):
    folder = fresh_copy(original, place)
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    change_tensors(folder / ADAPTER_FILE, lambda tensors: tensors.update({key: torch.zeros(80, 48)}))
    forge(folder)
    with pytest.raises(ArtifactError, match=f"'{key}' is no tensor of this adapter"):
        load_init(folder)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_base_weight_of_the_name_of_a_kept_layer_is_refused(original, place, name):
    folder = fresh_copy(original, place)
    keep_base_weight(folder, name)
    with pytest.raises(ArtifactError, match=f"'base_model.model.{name}' is no tensor of this adapter"):
        load_init(folder)


def turn_a_column(tensors):
    tensors[f"{LAYER}.basis_B"][:, 5] *= -1


def turn_a_row(tensors):
    tensors[f"{LAYER}.basis_A"][5] *= -1


def exchange_rows(tensors):
    tensors[f"{LAYER}.basis_A"][[4, 5]] = tensors[f"{LAYER}.basis_A"][[5, 4]]


@pytest.mark.parametrize("change", [turn_a_column, turn_a_row, exchange_rows])
def test_a_direction_beyond_the_adapter_s_rank_is_tied_to_the_report(original, place, change):
    folder = fresh_copy(original, place)
    change_tensors(folder / BASIS_FILE, change)
    forge(folder)
    with pytest.raises(ArtifactError, match=f"has other sums over the basis of {LAYER} than the stored one"):
        load_init(folder)


def test_a_gradient_that_is_not_that_of_the_basis_is_refused(original, place):
    folder = fresh_copy(original, place)
    change_tensors(folder / STATISTICS_FILE, lambda tensors: tensors[f"{LAYER}.weight_grad"].mul_(1.001))
    forge(folder)
    with pytest.raises(ArtifactError, match=f"the basis of {LAYER} is not what comes of the stored statistics"):


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("plan"),
        lambda report: report.update(later=1),
        lambda report: report["layers"][0].pop("basis_A_sums"),
        lambda report: report["layers"][0].update(basis_A_sums=[], basis_B_sums=[]),
    ],
)
def test_a_report_with_other_fields_is_refused(original, place, change):
    folder = fresh_copy(original, place)
    report = json.loads((folder / REPORT_FILE).read_text())
    change(report)
    (folder / REPORT_FILE).write_text(json.dumps(report))
    forge(folder)
    with pytest.raises(ArtifactError, match=r"expected the fields|has other sums over the basis"):
        load_init(folder)


def test_an_adapter_whose_product_is_no_number_is_refused(original, place):
    folder = fresh_copy(original, place)
    rank = load_init(folder).manifest.layers[LAYER].rank
    basis_A = load_file(folder / BASIS_FILE)[f"{LAYER}.basis_A"][:rank].double()

    def overflow(tensors):
        key_A, key_B = (next(k for k in tensors if k.endswith(f"{LAYER}.lora_{factor}.weight")) for factor in "AB")
        mixed = torch.eye(rank, dtype=torch.float64)
        mixed[:, 0], mixed[0] = 4.0, -4.0
        tensors[key_A] = mixed @ basis_A
        tensors[key_B] = torch.full_like(tensors[key_B], 1.7e308, dtype=torch.float64)

    change_tensors(folder / ADAPTER_FILE, overflow)
    forge(folder)
    with pytest.raises(
        ArtifactError, match="is not the step of the manifest along the stored basis: it misses it by nan"
    ):
        load_init(folder)


def test_an_adapter_in_another_precision_is_accepted(original, place):
    folder = fresh_copy(original, place)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / ADAPTER_FILE).items()}
    save_file(tensors, folder / ADAPTER_FILE)
    forge(folder)
    load_init(folder)


def test_a_card_and_its_pictures_may_lie_beside(original, place):
    folder = fresh_copy(original, place)
    for name in ("README.md", "spectra.png", ".gitattributes", ".gitignore", "LICENSE", "NOTICE"):
        (folder / name).write_bytes(b"anything")
    load_init(folder)


@pytest.mark.parametrize("value", ["2024-02-30", "!!timestamp z", "[" * 5000, "[a"])
def test_a_page_whose_metadata_cannot_be_read_is_taken_along(original, place, value):
    folder = fresh_copy(original, place)
    (folder / "README.md").write_text(f"---\ndate: {value}\n---\nmine\n")
    with atomic_folder(folder) as partial:
        (partial / "new").touch()
    assert {path.name for path in folder.iterdir()} == {"README.md", "new"}
    assert not list(folder.parent.glob("_*"))


def test_what_other_programs_leave_in_a_folder_may_lie_beside(original, place):
    folder = fresh_copy(original, place)
    (folder / ".DS_Store").write_bytes(b"anything")
    for name in (".cache", ".ipynb_checkpoints"):
        (folder / name / "inside").mkdir(parents=True)
    load_init(folder)
    check_replaceable(folder)
    (folder / ".git").mkdir()  # of a clone
    load_init(folder)
    with pytest.raises(ConfigError, match=r"holds something else than an initialisation \(.git\)"):
        check_replaceable(folder)
    (folder / ".git").rmdir()
    (folder / "lora_da_statistics-notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"holds something else than an initialisation \(lora_da_statistics-notes.txt\)"
    ):
        check_replaceable(folder)
    (folder / "lora_da_statistics-notes.txt").unlink()
    (folder / ".DS_Store").unlink()
    (folder / ".DS_Store").mkdir()
    with pytest.raises(ArtifactError, match=r".DS_Store is not listed in the manifest"):
        load_init(folder)


def test_anything_else_may_not(original, place):
    folder = fresh_copy(original, place)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"notes.txt is not listed in the manifest. Remove it, or fetch"):
        load_init(folder)


# Tensors besides the factors that were initialised


OTHERS = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "kept embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "kept embedding, DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens of two": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
    "biases": {"bias": "all"},
    "a target that no module has": {"target_modules": ["q_proj", "nowhere"]},
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Return ``others(name)``: an initialisation whose adapter has other tensors, computed once."""

    @functools.cache
    def make(name):
        model = make_lora_model(model=make_tiny_llama(), **{"target_modules": ["q_proj"], **OTHERS[name]})
        return store_init(tmp_path_factory.mktemp("others") / "init", model, save_statistics=False, step_size=0.1)

    return make


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_as_they_are_written_are_accepted(others, name):
    assert check_against_base(load_init(others(name)), make_tiny_llama()) == ()


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


PREFIX = "base_model.model."
EMBEDDING = f"{PREFIX}model.embed_tokens"
TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
HEAD = f"{PREFIX}lm_head.lora_"
MEANINGS = {
    "bias": ("lora_bias", lambda t: t[f"{PREFIX}{LAYER}.lora_B.bias"].fill_(9.0)),
    "embedding not zero": ("kept embedding", lambda t: t[f"{EMBEDDING}.lora_embedding_A"].fill_(0.1)),
    "embedding of another rank": (
        "kept embedding",
        lambda t: t.update({f"{EMBEDDING}.lora_embedding_{x}": torch.zeros(3, 3) for x in "AB"}),
    ),
    "half an embedding": ("kept embedding", lambda t: t.pop(f"{EMBEDDING}.lora_embedding_B")),
    "bias of nothing": (
        "lora_bias",
        lambda t: rename(t, f"{PREFIX}{LAYER}.lora_B.bias", f"{PREFIX}lm_head.lora_B.bias"),
    ),
    "magnitude of nothing": (
        "kept embedding, DoRA",
        lambda t: rename(t, f"{EMBEDDING}.lora_magnitude_vector", f"{PREFIX}lm_head.lora_magnitude_vector"),
    ),
    "negative magnitude": ("kept embedding, DoRA", lambda t: t[f"{EMBEDDING}.lora_magnitude_vector"].mul_(-1)),
    "tokens more": ("tokens", lambda t: t.update({TOKENS: t[TOKENS].repeat(2, 1)})),
    "tokens of no module": (
        "tokens of two",
        lambda t: rename(t, TOKENS, f"{PREFIX}model.norm.token_adapter.trainable_tokens_delta"),
    ),
    "adapter of nothing": (
        "plain",
        lambda t: t.update({f"{HEAD}A.weight": torch.ones(4, 48), f"{HEAD}B.weight": torch.ones(96, 4)}),
    ),
}


def change_others(others, place, name, change):
    folder = fresh_copy(others(name), place)
    change_tensors(folder / ADAPTER_FILE, change)
    forge(folder)
    return folder


@pytest.mark.parametrize("what", MEANINGS)
def test_what_peft_would_not_start_with_is_refused(others, place, what):
    folder = change_others(others, place, *MEANINGS[what])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors"):
        load_init(folder)


def keep_head(folder):
    report = json.loads((folder / REPORT_FILE).read_text())
    report["kept"]["lm_head"] = "so"
    (folder / REPORT_FILE).write_text(json.dumps(report))
    forge(folder, lambda values: values["kept"].update({"lm_head": "so"}))


def test_what_is_only_said_to_be_kept_is_refused_unless_it_is_zero(others, place):
    folder = change_others(others, place, *MEANINGS["adapter of nothing"])
    keep_head(folder)
    with pytest.raises(ArtifactError, match="the adapter of lm_head, which PEFT initialised, is not zero"):
        load_init(folder)


def test_a_target_that_is_no_layer_of_the_manifest_is_refused(others, place):
    folder = fresh_copy(others("plain"), place)
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    config["target_modules"].append("up_proj")
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config))
    forge(folder)
    with pytest.raises(ArtifactError, match="target_modules holds 'up_proj', and the manifest no layer of that name"):
        load_init(folder)


OF_THE_BASE = {
    "magnitude": ("kept embedding, DoRA", f"{PREFIX}{LAYER}.lora_magnitude_vector"),
    "kept magnitude": ("kept embedding, DoRA", f"{EMBEDDING}.lora_magnitude_vector"),
    "saved": ("saved head", f"{PREFIX}lm_head.weight"),
    "tokens": ("tokens", TOKENS),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("what", OF_THE_BASE)
def test_what_only_the_base_tells_is_compared_with_it(others, place, what, adapted):
    name, key = OF_THE_BASE[what]
    folder = change_others(others, place, name, lambda tensors: tensors[key].mul_(50.0))
    model = make_lora_model(**OTHERS[name]) if adapted else make_tiny_llama()
    with pytest.raises(ArtifactError, match=f"'{key}' is not what follows from the base model"):
        check_against_base(load_init(folder), model)


def test_a_head_that_is_random_in_the_base_is_noted(tmp_path):
    def make(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForSequenceClassification(make_tiny_llama().config)

    base = make(0)
    head = torch.randn_like(base.score.weight)
    samples = [{**s, "labels": i % 2} for i, s in enumerate(make_learnable_samples(16))]
    base.config.pad_token_id = 0
    initialize_lora_da(
        make_lora_model(model=base, task_type="SEQ_CLS", target_modules=["q_proj"]),
        samples,
        config=make_config(step_size=0.1),
        data_collator=collate_classes,
        output_dir=tmp_path / "init",
        progress=False,
    )
    with torch.no_grad():
        plain = base.score.original_module if hasattr(base.score, "original_module") else base.score
        plain.weight.copy_(head)
    (note,) = check_against_base(load_init(tmp_path / "init"), base)
    assert note == "score.weight was not compared with the base's, which is random"
