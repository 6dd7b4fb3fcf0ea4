"""Fetching: complete and checked, or not at all, whatever the network and the cache do."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_tiny_llama
from harness import BASE_NAME, assert_same_tensors, written_adapter
from local_hub import STATISTICS_FILE
from peft import LoraConfig, PeftModel, get_peft_model

import lora_da_hf.hub
from lora_da_hf import apply_init, load_init
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, MANIFEST_FILE
from lora_da_hf.errors import ArtifactError, HubError
from lora_da_hf.hub import list_inits
from lora_da_hf.training.callback import find_init

REPO = "alice/init"
GONE = "cache does not hold all of it"


def contents(folder, *without):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


def damage(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.resolve().write_bytes(data)


def base():
    return make_tiny_llama(name_or_path=BASE_NAME)


def start_from(init):
    """Start as the card has it: with the stored config."""
    return apply_init(get_peft_model(base(), LoraConfig.from_pretrained(init.folder)), init)


# The whole way


def test_what_is_pulled_is_what_was_pushed_to_the_bit_and_loads(init, push, pull):
    commit = push().oid
    pulled = pull()
    assert contents(pulled.folder) == contents(init)
    assert pulled.source == f"{REPO}@{commit}"
    assert pulled.manifest == load_init(init).manifest
    assert_same_tensors(written_adapter(pulled.folder), written_adapter(init))
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    logits = [PeftModel.from_pretrained(base(), place).eval()(**tokens).logits for place in (init, pulled.folder)]
    assert torch.equal(*logits)
    assert start_from(pulled).init_from == f"{REPO}@{commit}"


def test_pull_by_tag_commit_branch_and_pull_request(hub, init, another, push, pull):
    first = push()
    hub.repos[REPO].refs["old"] = first.oid
    second = push(another)
    hub.repos[REPO].refs["refs/pr/1"] = second.oid
    for revision, expected, folder in (
        (None, second, another),
        ("main", second, another),
        ("refs/pr/1", second, another),
        ("old", first, init),
        (first.oid, first, init),
    ):
        pulled = pull(revision=revision)
        assert pulled.source == f"{REPO}@{expected.oid}"
        assert contents(pulled.folder) == contents(folder)


def test_a_start_needs_no_statistics_and_they_are_not_fetched(hub, init, push, pull, monkeypatch):
    commit = push().oid
    monkeypatch.setattr(lora_da_hf.hub, "pull_init", pull)
    for name in (REPO, f"{REPO}@{commit}"):
        found = find_init(name)
        assert contents(found.folder) == contents(init, STATISTICS_FILE)
        assert start_from(found).init_from == f"{REPO}@{commit}"
    assert STATISTICS_FILE not in hub.downloads()
    assert contents(pull().folder) == contents(init)


def test_nothing_but_the_files_of_the_manifest_is_fetched(hub, push, pull):
    push()
    extra = {"adapter_model.bin": b"evil", "modeling.py": b"evil"}
    hub.repos[REPO].commit({**hub.repos[REPO].files, **extra})
    folder = pull().folder
    wanted = {MANIFEST_FILE, *load_init(folder).manifest.files}
    assert set(hub.downloads()) == wanted == {path.name for path in folder.iterdir()}
    (folder / "modeling.py").write_bytes(b"fetched by somebody else")
    assert pull().folder == folder


# Who may read


def test_what_may_not_be_read_is_not_taken_from_the_cache(hub, push, pull):
    push()
    pull()
    for token in (False, "hf_bob"):
        with pytest.raises(HubError, match="your token may not read it"):
            pull(token=token)
    hub.repos[REPO].private, hub.repos[REPO].gated = False, True
    with pytest.raises(HubError, match="is gated"):
        pull(token="hf_bob")
    hub.repos[REPO].gated = False
    assert pull(token="hf_bob").folder


@pytest.mark.parametrize(
    ("repo_id", "revision", "error"),
    [(REPO, "v9", HubError), ("alice/init@v1", None, HubError), ("../x", None, HubError)],
)
def test_a_revision_or_a_name_that_is_none(push, pull, repo_id, revision, error):
    push()
    with pytest.raises(error, match=revision or repo_id):
        pull(repo_id, revision=revision)


def test_a_repo_without_a_manifest_is_no_initialisation(hub, push, pull):
    push()
    del hub.repos[REPO].files[MANIFEST_FILE]
    with pytest.raises(HubError, match=MANIFEST_FILE):
        pull()


# Offline


@pytest.mark.parametrize("by_environment", [False, True])
def test_what_was_pulled_is_there_without_a_network(hub, init, push, pull, monkeypatch, by_environment):
    commit = push().oid
    hub.repos[REPO].refs["v1"] = commit
    pull(revision="v1")
    hub.close()
    with pytest.raises(HubError, match="could not be reached"):
        pull(revision="v1")
    if by_environment:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = {} if by_environment else {"local_files_only": True}
    for revision in ("v1", commit):
        pulled = pull(revision=revision, **offline)
        assert pulled.source == f"{REPO}@{commit}"
        assert contents(pulled.folder) == contents(init)
    with pytest.raises(HubError, match=GONE):
        pull(revision="main", **offline)


def test_a_cache_that_lacks_a_file_does_not_pass_offline(push, pull):
    push()
    with pytest.raises(HubError, match=GONE):
        pull(local_files_only=True)
    folder = pull(statistics=False).folder
    assert pull(statistics=False, local_files_only=True).folder == folder
    with pytest.raises((HubError, ArtifactError), match=f"{GONE}|{STATISTICS_FILE}"):
        pull(local_files_only=True)
    (folder / ADAPTER_FILE).unlink()
    with pytest.raises((HubError, ArtifactError), match=f"{GONE}|{ADAPTER_FILE}"):
        pull(statistics=False, local_files_only=True)


@pytest.mark.parametrize("offline", [False, True])
def test_a_read_only_cache_is_used(init, push, pull, tmp_path, offline):
    push()
    folder = pull().folder
    assert contents(folder) == contents(init)
    places = [path for path in (tmp_path / "cache").rglob("*") if not path.is_symlink()]
    before = {path: path.stat().st_mtime_ns for path in places}
    for path in places:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert pull(local_files_only=offline).folder == folder
        assert {path: path.stat().st_mtime_ns for path in places} == before
    finally:
        for path in places:
            path.chmod(0o755)


@pytest.mark.slow
def test_endpoint_token_and_offline_come_from_the_environment(hub, push, tmp_path):
    commit = push().oid
    script = (
        "from lora_da_hf.hub import pull_init, list_inits\n"
        f"print(pull_init({REPO!r}, cache_dir={str(tmp_path / 'cache')!r}).source)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def run(script, **more):
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, check=False)

    found = run(script + "print(*[init.id for init in list_inits()])", HF_TOKEN="hf_alice")
    assert found.stdout.split() == [f"{REPO}@{commit}", REPO], found.stderr
    hub.close()
    assert run(script, HF_HUB_OFFLINE="1").stdout.split() == [f"{REPO}@{commit}"]
    assert "HF_HUB_OFFLINE" in run("from lora_da_hf.hub import list_inits\nlist_inits()", HF_HUB_OFFLINE="1").stderr


# Damage, and several at once


@pytest.mark.parametrize("name", [MANIFEST_FILE, ADAPTER_FILE, STATISTICS_FILE])
def test_a_damaged_cache_is_noticed_and_fetched_again(init, push, pull, name):
    push()
    folder = pull().folder
    damage(folder / name)
    with pytest.raises(ArtifactError, match=name):
        pull(local_files_only=True)
    assert contents(pull().folder) == contents(init)
    assert contents(pull(local_files_only=True).folder) == contents(init)


def test_four_pulls_at_once(init, push, pull):
    push()
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda n: contents(pull(statistics=n % 2 == 0).folder), range(4)))
    for found in results:
        assert {**contents(init), **found} == contents(init)
        assert set(contents(init, STATISTICS_FILE)) <= set(found)


# Listing


def test_listing_finds_what_one_may_see(hub, push):
    first = push(repo_id="alice/one", private=False, license="mit")
    push(repo_id="alice/two")

    def found(**settings):
        return list_inits(endpoint=hub.endpoint, **{"token": "hf_alice", **settings})

    assert [item.id for item in found()] == ["alice/one", "alice/two"]
    assert [item.id for item in found(base_model="org/base", limit=1)] == ["alice/one"]
    assert found(base_model="org/other") == found(author="bob") == []
    (item,) = found(token=False)
    assert (item.id, item.sha, item.private) == ("alice/one", first.oid, False)
    assert (item.card_data["base_model"], item.card_data["lora_da"]["max_rank"]) == ("org/base", 6)
    assert {"lora-da", "lora-init", "base_model:adapter:org/base"} <= set(item.tags)
