"""A Hub on loopback for every test, and one small initialisation to push to it."""

import shutil

import pytest
from harness import make_init
from local_hub import LocalHub

from lora_da_hf.hub import pull_init, push_init

REPO = "alice/init"


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return make_init(tmp_path_factory.mktemp("original") / "init", max_rank=6)


@pytest.fixture
def init(original, tmp_path):
    return shutil.copytree(original, tmp_path / "init")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    hub = LocalHub()
    yield hub
    hub.close()


@pytest.fixture
def push(hub, init):
    """Return ``push(folder=init, repo_id="alice/init", **settings)``, which pushes with a token."""

    def push(folder=init, repo_id=REPO, **settings):
        return push_init(folder, repo_id, **{"endpoint": hub.endpoint, "token": "hf_alice", **settings})

    return push


@pytest.fixture
def pull(hub, tmp_path):
    """Return ``pull(**settings)``, which pulls with a token into a cache of the test."""

    def pull(repo_id=REPO, **settings):
        defaults = {"endpoint": hub.endpoint, "token": "hf_alice", "cache_dir": tmp_path / "cache"}
        return pull_init(repo_id, **{**defaults, **settings})

    return pull


@pytest.fixture(scope="session")
def another(tmp_path_factory):
    """An initialisation that differs from the first one: no statistics, another step."""
    return make_init(tmp_path_factory.mktemp("another") / "init", step_size=0.2, save_statistics=False)
