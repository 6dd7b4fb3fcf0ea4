import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from conftest import make_lora_model, make_tiny_llama
from harness import BASE_NAME, assert_same_tensors, change_tensors, forge_manifest, store_init, written_adapter
from huggingface_hub import HfApi
from local_hub import CARD, File, Repo
from peft import PeftModel

import lora_da_hf.hub.pull
from lora_da_hf import apply_init
from lora_da_hf.artifacts.manifest import ADAPTER_FILE, BASIS_FILE, MANIFEST_FILE, REPORT_FILE
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.cli.main import main
from lora_da_hf.errors import ArtifactError, BaseModelMismatchError, CardError, ConfigError, HubError
from lora_da_hf.hub import list_inits
from lora_da_hf.hub.cards import card_plots, render_card
from lora_da_hf.pipeline.base_model import base_model_facts
from lora_da_hf.pipeline.refit import refit_init
from lora_da_hf.training.init_source import find_init

REPO = "alice/init"
STATISTICS_FILE = "lora_da_statistics-00001-of-00001.safetensors"


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forget(hub):
    hub.log.clear()


# The whole way


def test_what_is_pulled_is_what_was_pushed_to_the_bit_and_loads(init, push, pull):
    pushed = push()
    pulled = pull()
    assert contents(pulled.folder) == contents(init)
    assert (pulled.repo_id, pulled.commit, pulled.revision) == (REPO, pushed.commit, None)
    assert_same_tensors(written_adapter(pulled.folder), written_adapter(init))
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    logits = [
        PeftModel.from_pretrained(make_tiny_llama(), folder).eval()(**tokens).logits for folder in (init, pulled.folder)
    ]
    assert torch.equal(*logits)


def test_a_push_is_one_commit_with_card_and_manifest_tagged_by_schema(hub, push):
    pushed = push()
    repo = hub.repos[REPO]
    assert list(repo.commits)[1:] == [pushed.commit]
    assert {"README.md", MANIFEST_FILE, ADAPTER_FILE, STATISTICS_FILE} <= set(repo.commits[pushed.commit])
    assert repo.tags == {"schema-v1": pushed.commit}
    assert (pushed.tag, pushed.changed, pushed.private, pushed.pull_request_url) == ("schema-v1", True, True, None)
    assert pushed.url == f"{hub.endpoint}/{REPO}/commit/{pushed.commit}"


def test_pull_by_tag_commit_and_branch(api, init, another, push, pull):
    first = push()
    api.create_branch(REPO, branch="old", revision=first.commit)
    second = push(another())
    assert second.commit != first.commit
    assert pull().commit == pull(revision="main").commit == pull(revision="schema-v1").commit == second.commit
    for revision in ("old", first.commit, first.commit[:8]):
        pulled = pull(revision=revision)
        assert (pulled.commit, pulled.revision) == (first.commit, revision)
        assert contents(pulled.folder) == contents(init)


def test_a_second_push_removes_what_the_first_had_and_it_has_not(hub, another, push, pull):
    push()
    second = push(another())
    assert STATISTICS_FILE not in hub.repos[REPO].commits[second.commit]
    assert hub.repos[REPO].tags == {"schema-v1": second.commit}
    assert not (pull().folder / STATISTICS_FILE).exists()


def test_a_second_push_leaves_the_files_of_others_whatever_they_are_called(api, hub, another, push):
    push()
    others = {"lora_da_results.md", "lora_da_eval/table.csv", "lora_da_statistics-ours.txt", f"old/{STATISTICS_FILE}"}
    for name in others:
        api.upload_file(path_or_fileobj=b"our own", path_in_repo=name, repo_id=REPO)
    second = push(another())
    files = set(hub.repos[REPO].commits[second.commit])
    assert others <= files
    assert STATISTICS_FILE not in files


def test_a_push_to_a_branch_leaves_main_and_the_tag(api, another, push, pull):
    first = push()
    api.create_branch(REPO, branch="trial")
    second = push(another(), revision="trial")
    assert second.tag is None
    assert pull().commit == pull(revision="schema-v1").commit == first.commit
    assert pull(revision="trial").commit == second.commit


def test_a_new_repo_has_no_other_branch_and_is_not_made_for_one(hub, push):
    with pytest.raises(HubError, match=r"alice/init is not there yet, .* no branch but main. Push without a revision"):
        push(revision="trial")
    assert REPO not in hub.repos
    assert push(revision="main").tag == "schema-v1"
    with pytest.raises(HubError, match=r"the repo has no such branch, tag or commit.*page\.$"):
        push(revision="trial")


@pytest.mark.parametrize("settings", [{}, {"create_pr": True}])
def test_a_push_does_not_write_over_something_else(api, hub, init, push, settings):
    api.create_repo(REPO, private=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        api.upload_file(path_or_fileobj=b"trained for weeks", path_in_repo=name, repo_id=REPO)
    before = len(hub.repos[REPO].commits)
    with pytest.raises(HubError, match=r"holds something else than an init.* \(adapter_config.json\).* another repo"):
        push(**settings)
    assert len(hub.repos[REPO].commits) == before


@pytest.mark.parametrize("names", [["README.md", "config.json"], ["README.md"], ["config.json"], ["data/rows.csv"]])
def test_a_push_does_not_take_over_a_repo_whose_card_or_config_is_not_ours(api, hub, push, names):
    api.create_repo(REPO, private=True)
    for name in names:
        api.upload_file(path_or_fileobj=b"somebody's own", path_in_repo=name, repo_id=REPO)
    head = hub.repos[REPO].branches["main"]
    with pytest.raises(HubError, match=names[0]):
        push(card=None)
    assert hub.repos[REPO].branches["main"] == head


def test_a_push_to_a_repo_with_a_licence_alone(api, push, pull):
    api.create_repo(REPO, private=True)
    for name in ("LICENSE", ".gitignore"):
        api.upload_file(path_or_fileobj=b"soon", path_in_repo=name, repo_id=REPO)
    assert push().commit == pull().commit


def test_a_push_without_changes_makes_no_commit(hub, push):
    first = push()
    again = push()
    assert (again.commit, again.changed) == (first.commit, False)
    assert len(hub.repos[REPO].commits) == 2


def test_a_tag_that_an_interrupted_push_did_not_set_is_set_by_the_next(hub, push):
    first = push()
    hub.repos[REPO].tags.clear()
    assert push().tag == "schema-v1"
    assert hub.repos[REPO].tags == {"schema-v1": first.commit}


def test_a_pull_request_leaves_the_branch_and_can_be_pulled(hub, another, push, pull):
    first = push()
    proposed = push(another(), create_pr=True)
    assert proposed.pull_request_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert proposed.tag is None
    assert pull().commit == first.commit
    assert pull(revision="refs/pr/1").commit == proposed.commit


def test_what_was_deleted_is_not_there(api, push, pull):
    push()
    pull()
    api.delete_repo(REPO)
    with pytest.raises(HubError, match=r"Pulling alice/init failed: there is no such repo, or it is private"):
        pull()


def test_the_storage_never_sees_a_token_and_the_hub_does(hub, push, pull):
    hub.multipart_above = 4096
    push()
    pull()
    assert {seen.authorization for seen in hub.seen(server="storage")} == {None}
    assert hub.seen(server="storage", method="PUT", contains=".part2")
    assert hub.seen(server="storage", method="GET")
    assert hub.seen(server="hub", method="POST", contains="/commit/")[0].authorization == "Bearer hf_alice"


# Concurrent writers


def test_a_stale_parent_is_refused(hub, another, push):
    first = push()
    push(another())
    with pytest.raises(HubError, match=r"somebody else pushed meanwhile. Look at what changed, and push again"):
        push(parent_commit=first.commit)
    assert len(hub.repos[REPO].commits) == 3


def test_of_two_writers_at_once_one_wins(hub, init, another, push):
    push(init)
    other = another()
    third = shutil.copytree(other, other.parent / "third")
    forge_manifest(third, created="2020-01-01T00:00:00+00:00")
    hub.before_commit = threading.Barrier(2, timeout=30).wait
    results = []

    def write(folder):
        try:
            results.append(push(folder))
        except HubError as error:
            results.append(error)

    threads = [threading.Thread(target=write, args=(folder,)) for folder in (other, third)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [result for result in results if isinstance(result, HubError)]
    (won,) = [result for result in results if not isinstance(result, HubError)]
    assert len(lost) == 1
    assert "somebody else pushed meanwhile" in str(lost[0])
    assert hub.repos[REPO].branches["main"] == won.commit == hub.repos[REPO].tags["schema-v1"]
    assert len(hub.repos[REPO].commits) == 3


def test_a_name_that_the_hub_does_not_allow_is_refused_before_anything_is_asked(hub, push):
    with pytest.raises(ConfigError, match="repo_id='a b' is no name of a repository on the Hub"):
        push(repo_id="a b")
    assert not hub.log


@pytest.mark.parametrize("name", ["parent_commit", "revision"])
def test_an_empty_revision_is_refused(hub, push, name):
    with pytest.raises(ConfigError, match=f"{name} is empty. Give one, or leave it out"):
        push(**{name: ""})
    assert not hub.log


def test_a_stale_parent_is_refused_even_if_nothing_changed(hub, push):
    commit = push().commit
    with pytest.raises(HubError, match=rf"alice/init is at {commit}, not at 0000000: somebody else pushed meanwhile"):
        push(parent_commit="0000000")
    assert push(parent_commit=commit).commit == push(parent_commit=commit[:7]).commit == commit


def test_what_arrived_is_compared_with_what_was_sent(hub, push):
    def damage_in_repo(repo):
        files = repo.commits[repo.branches["main"]]
        files[ADAPTER_FILE] = File(size=files[ADAPTER_FILE].size, sha256="0" * 64)

    hub.after_commit = damage_in_repo
    with pytest.raises(ArtifactError, match=rf"{ADAPTER_FILE} has SHA-256 000.* is on the Hub all the same"):
        push()
    assert hub.repos[REPO].tags == {}


def test_the_tag_stays_if_somebody_pushed_on_top(hub, another, push):
    first = push()

    def push_on_top(repo):
        repo.branches["main"] = repo.add_commit(dict(repo.commits[repo.branches["main"]]))

    hub.after_commit = push_on_top
    second = push(another())
    assert second.tag is None
    assert second.commit != hub.repos[REPO].branches["main"]
    assert hub.repos[REPO].tags == {"schema-v1": first.commit}


def test_a_repo_that_changes_while_it_is_read_is_pulled_again(hub, push, pull):
    first = push().commit
    repo = hub.repos[REPO]

    def change():
        hub.after_info = None
        repo.branches["main"] = repo.add_commit(dict(repo.commits[first]))

    hub.after_info = change
    with pytest.raises(HubError, match=rf"changed while it was read: it was {first}, now \w+. Pull again"):
        pull()
    assert pull().commit == repo.branches["main"]


# Who may read and write


def test_a_private_repo_needs_a_token(push, pull, tmp_path):
    push()
    for token in (False, "hf_bob"):
        with pytest.raises(HubError, match=r"it is private and the token in use may not read it"):
            pull(token=token, cache_dir=tmp_path / "other")


def test_what_may_not_be_read_any_more_is_not_taken_from_the_cache(hub, push, pull):
    push()
    pull()
    with pytest.raises(HubError, match=r"it is private and the token in use may not read it"):
        pull(token=False)
    hub.repos[REPO].private, hub.repos[REPO].gated = False, True
    with pytest.raises(HubError, match=r"the repo is gated. Accept its conditions on its page"):
        pull(token=False)


def test_a_gated_repo_can_be_read_by_whom_it_lets(hub, push, pull):
    push(private=False)
    hub.repos[REPO].gated = True
    with pytest.raises(HubError, match="the repo is gated"):
        pull(token="hf_bob")
    hub.repos[REPO].accepted.add("bob")
    assert load_init(pull(token="hf_bob").folder)


def test_somebody_elses_repo_cannot_be_written(push):
    push(private=False)
    with pytest.raises(HubError, match=r"the token in use does not allow it \(403\)"):
        push(token="hf_bob", private=False, card=CARD + "Another one.")


def test_a_repo_that_turns_out_public_is_an_error_before_anything_is_sent(hub, push):
    hub.default_public = True
    with pytest.raises(HubError, match=r"alice/init is public, and private=True was asked for. Make it private"):
        push()
    assert len(hub.repos[REPO].commits) == 1
    assert not hub.seen(server="storage")


def test_a_repo_that_is_made_public_during_the_push_is_an_error(hub, push):
    def publish():
        hub.repos[REPO].private = False

    hub.before_commit = publish
    with pytest.raises(HubError, match="alice/init is public, and private=True was asked for") as caught:
        push()
    assert f"The commit {hub.repos[REPO].branches['main']} is on the Hub all the same" in str(caught.value)


def make_base(hub, text, **settings):
    repo = hub.repos["org/base"] = Repo("org/base", private=False, **settings)
    content = f"---\n{text}\n---\n".encode()
    repo.branches["main"] = repo.add_commit({"README.md": File(size=len(content), content=content)})


@pytest.mark.parametrize("known", [False, True])
def test_a_public_push_needs_a_licence_of_its_own_or_of_the_base(hub, push, known):
    make_base(hub, "license: mit" if known else "language: en")
    if known:
        assert not push(private=False, card=None).private
        assert metadata_of(hub)["license"] == "mit"
        return
    with pytest.raises(
        HubError, match=r"needs a licence, and the Hub names none for its base 'org/base'. Pass license="
    ):
        push(private=False, card=None)
    assert REPO not in hub.repos
    assert not push(private=False, card=None, license="apache-2.0").private
    assert metadata_of(hub)["license"] == "apache-2.0"


@pytest.mark.parametrize(("given", "stated"), [("mit", "mit"), (None, "apache-2.0")])
def test_the_card_states_the_base_s_licence_as_the_hub_has_it(hub, push, given, stated):
    make_base(hub, "license: apache-2.0")
    push(card=None, license=given)
    licences = card_of(hub).split("## Licences\n")[1].split("\n## ")[0]
    assert metadata_of(hub)["license"] == stated
    (of_base,) = [line for line in licences.splitlines() if "base model" in line]
    assert "apache-2.0" in of_base
    assert "mit" not in of_base
    assert f"`{stated}`" in licences


def files_of(hub):
    repo = hub.repos[REPO]
    return {name: file.content for name, file in repo.commits[repo.branches["main"]].items()}


def test_a_licence_in_the_folder_goes_with_it(hub, init, push, pull):
    (init / "LICENSE").write_bytes(b"Do good.")
    push(card=None, license="other", license_name="own", license_link="LICENSE")
    assert files_of(hub)["LICENSE"] == b"Do good."
    assert metadata_of(hub)["license_link"] == "LICENSE"
    assert load_init(pull().folder).manifest == load_init(init).manifest
    (init / "LICENSE").unlink()
    with pytest.raises(CardError, match="license_link='LICENSE' is no file that goes with"):
        push(card=None, license="other", license_name="own", license_link="LICENSE")


def test_a_licence_beside_the_card_of_the_base_is_linked_there(hub, push):
    make_base(hub, "license: other\nlicense_name: own\nlicense_link: LICENSE")
    push(card=None)
    assert metadata_of(hub)["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE"


def test_a_card_of_ones_own_says_the_licence(hub, push):
    make_base(hub, "license: mit")
    with pytest.raises(HubError, match=r"needs a licence, and your card names none. Say it in the card's metadata"):
        push(private=False, card="---\ntags: [lora-da]\n---\n")
    assert REPO not in hub.repos
    push(private=False)
    assert metadata_of(hub)["license"] == "apache-2.0"


def test_a_base_that_the_hub_does_not_know_has_no_licence(push):
    with pytest.raises(HubError, match="the Hub names none for its base 'org/base'"):
        push(private=False, card=None)
    assert push(card=None).private


def card_of(hub):
    repo = hub.repos[REPO]
    return repo.commits[repo.branches["main"]]["README.md"].content.decode()


def metadata_of(hub):
    return yaml.safe_load(card_of(hub).split("---\n")[1])


def test_the_card_is_rendered_with_what_the_hub_says_of_the_base(hub, push):
    make_base(hub, "license: other\nlicense_name: own\nlicense_link: https://example.org")
    push(card=None)
    metadata = metadata_of(hub)
    named = {name: metadata[name] for name in ("license", "license_name", "license_link")}
    assert named == {"license": "other", "license_name": "own", "license_link": "https://example.org"}
    assert REPO in card_of(hub)
    push(card=None, license="other", license_name="theirs")
    assert metadata_of(hub)["license_name"] == "theirs"
    assert metadata_of(hub)["license_link"] == "https://example.org"
    push(card=None, license="mit")
    assert {"license_name", "license_link"} & set(metadata_of(hub)) == set()


def test_what_is_said_for_the_card_is_on_it(hub, push):
    facts = {"datasets": ["org/data", "own notes"], "language": ["en"], "hardware": "a large machine"}
    push(card=None, license="mit", base_model="org/other", notes=["For short texts."], **facts)
    metadata, card = metadata_of(hub), card_of(hub)
    assert (metadata["base_model"], metadata["datasets"], metadata["language"]) == ("org/other", ["org/data"], ["en"])
    assert all(text in card for text in ("own notes", "a large machine", "For short texts."))


@pytest.mark.parametrize(
    ("said", "message", "left"),
    [
        ("license: Apache 2.0", "says license='Apache 2.0', which is malformed and left out", {}),
        ("license: [mit, bsd]", "says license=", {}),
        (
            "license: other\nlicense_name: own\nlicense_link: http://example.org/a b",
            "says license_link='http://example.org/a b'",
            {"license": "other", "license_name": "own"},
        ),
    ],
)
def test_a_malformed_licence_of_the_base_is_left_out_with_a_warning(hub, push, said, message, left):
    make_base(hub, said)
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        push(card=None)
    ours = [warning for warning in warned if "which is malformed" in str(warning.message)]
    assert {warning.filename.rpartition("/")[2] for warning in ours} == {"conftest.py"}  # who called push_init
    metadata = metadata_of(hub)
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == left
    push()  # a card that says its licence: nothing is warned about


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"license": "Apache 2.0"}, "is no identifier of a licence"),
        ({"language": ["English"]}, "is no code of a language"),
        ({"base_model": "/home/me/model"}, "is no name of a model on the Hub"),
        ({"card": "---\ntags: [\n---\n"}, "The card's metadata cannot be read"),
        ({"card": CARD, "license": "mit", "hardware": "x"}, "and license, hardware too, which would change nothing"),
        ({"card": CARD + "![](step_search.png)"}, "The card shows step_search.png, which cannot be drawn"),
    ],
)
def test_a_card_that_cannot_be_is_refused_before_the_repo_is_made(hub, push, given, message):
    with pytest.raises((CardError, ConfigError), match=message):
        push(**{"card": None, **given})
    assert REPO not in hub.repos


def test_a_repo_without_an_owner_is_one_s_own(hub, push):
    assert push(card=None, repo_id="init").repo_id == REPO
    assert f"# {REPO}" in card_of(hub)


def pictures(hub):
    repo = hub.repos[REPO]
    return {name: file.content for name, file in repo.commits[repo.branches["main"]].items() if name.endswith(".png")}


def test_the_plots_come_and_go_with_the_card_that_shows_them(hub, init, another, push):
    push(card=None)
    assert list(pictures(hub)) == ["guidance_spectra.png"]
    first = pictures(hub)
    searched = another(step_size="line_search")
    push(searched, card=None)
    assert set(pictures(hub)) == {"guidance_spectra.png", "step_search.png"}
    assert pictures(hub)["guidance_spectra.png"] != first["guidance_spectra.png"]
    push(searched, card=CARD + "![the search](step_search.png)")
    assert set(pictures(hub)) == {"step_search.png"}
    push(searched, card=CARD + '<img src="./step_search.png" alt="the search">')
    assert set(pictures(hub)) == {"step_search.png"}
    push(init, card=card_of_folder(init))
    assert pictures(hub) == first
    push(init)
    assert pictures(hub) == {}
    assert len(hub.repos[REPO].commits) == 7


def card_of_folder(folder):
    stored = load_init(folder)
    return render_card(stored, license="mit", plots=card_plots(stored))


def test_a_public_push_to_a_private_repo_is_an_error_before_anything_is_sent(hub, another, push):
    first = push()
    forget(hub)
    with pytest.raises(
        HubError, match=r"alice/init is private, and private=False \(--public\) was asked for.*settings"
    ):
        push(another(), private=False)
    assert hub.repos[REPO].branches["main"] == first.commit
    assert not hub.seen(server="storage")


def test_a_repo_that_is_made_private_during_a_public_push_is_an_error(hub, push):
    def hide():
        hub.repos[REPO].private = True

    hub.before_commit = hide
    with pytest.raises(HubError, match="alice/init is private, and private=False"):
        push(private=False)


def test_a_gated_base_is_warned_about(hub, push):
    make_base(hub, "license: other", gated=True)
    with pytest.warns(
        UserWarning, match="The base model 'org/base' is gated: see whether its conditions let you share"
    ):
        push()


@pytest.mark.parametrize("name", ["/home/me/model", "models/tiny", "base"])
def test_a_base_that_is_a_folder_is_warned_about_and_not_asked_for(hub, init, push, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    base = load_init(init).manifest.base_model
    config = json.loads((init / "adapter_config.json").read_text())
    (init / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    forge_manifest(init, base_model={**base, "name_or_path": name})
    with pytest.warns(UserWarning, match=f"The base model is called '{name}', which is no name on the Hub"):
        push(card=None)
    assert not hub.seen(contains="tiny") + hub.seen(contains="models/base")
    make_base(hub, "license: mit")
    with pytest.warns(UserWarning, match=f"called '{name}', .*Only a card can say its name"):
        push(card=None, base_model="org/base")
    assert metadata_of(hub)["license"] == "mit"


def test_a_folder_that_is_not_valid_is_not_pushed(hub, init, push):
    (init / REPORT_FILE).write_text("{}")
    with pytest.raises(ArtifactError, match=f"{REPORT_FILE} has 2 bytes"):
        push()
    assert not hub.log


def test_statistics_that_are_not_finite_are_not_pushed(hub, init, push):
    change_tensors(init / STATISTICS_FILE, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    forge_manifest(init)
    with pytest.raises(ArtifactError, match="holds NaN or infinity"):
        push()
    assert not hub.log


# Broken connections


def test_an_interrupted_upload_leaves_no_commit_and_is_taken_up(hub, init, push, pull):
    hub.uploads_left = 1
    with pytest.raises(HubError, match=r"Pushing alice/init failed: .* The repo alice/init was made by this push"):
        push()
    assert len(hub.repos[REPO].commits) == 1
    assert hub.repos[REPO].tags == {}
    hub.uploads_left = None
    sent = {path.name for path in hub.folder.iterdir()}
    assert len(sent) == 1
    forget(hub)
    push()
    again = {seen.path.split("?")[0].strip("/") for seen in hub.seen(server="storage", method="PUT")}
    assert len(again) == 2
    assert not again & sent
    assert contents(pull().folder) == contents(init)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, init, push, pull, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    push()
    hub.cuts_left = 1
    assert contents(pull().folder) == contents(init)
    ranges = [seen.range for seen in hub.seen(server="storage", method="GET")]
    assert len([first for first in ranges if first not in (None, "bytes=0-")]) == 1


def test_a_download_that_keeps_breaking_off_leaves_nothing_that_passes_and_the_next_completes(
    hub, init, push, pull, tmp_path
):
    push()
    hub.cuts_left = 1000
    with pytest.raises(HubError, match="Pulling alice/init failed"):
        pull()
    hub.cuts_left = 0
    with pytest.raises(HubError, match="it is not completely in the cache, and the network is off"):
        pull(local_files_only=True)
    assert not list((tmp_path / "cache").glob(f"**/lora_da/*/{ADAPTER_FILE}"))
    assert contents(pull().folder) == contents(init)


# Offline


@pytest.mark.parametrize("by_environment", [False, True])
def test_what_was_pulled_is_there_without_a_network(hub, init, push, pull, monkeypatch, by_environment):
    pushed = push()
    pull(revision="schema-v1")
    hub.close()
    if by_environment:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = {} if by_environment else {"local_files_only": True}
    for revision in ("schema-v1", pushed.commit):
        pulled = pull(revision=revision, **offline)
        assert pulled.commit == pushed.commit
        assert contents(pulled.folder) == contents(init)
    with pytest.raises(HubError, match="it is not completely in the cache, and the network is off"):
        pull(revision="main", **offline)


def test_without_a_network_and_without_being_told_so_the_cache_is_not_used(hub, push, pull):
    push()
    pull()
    hub.close()
    with pytest.raises(HubError, match=r"the Hub could not be reached, or broke off. Check the network"):
        pull()


def test_a_snapshot_that_lost_a_file_does_not_pass_offline(push, pull, tmp_path):
    pushed = push()
    pulled = pull()
    shutil.rmtree(pulled.folder)
    (snapshot,) = (tmp_path / "cache").glob(f"*/snapshots/{pushed.commit}")
    (snapshot / ADAPTER_FILE).unlink()
    with pytest.raises(HubError, match="it is not completely in the cache"):
        pull(local_files_only=True)
    assert not pulled.folder.exists()


# Without statistics


def without_statistics(folder):
    return {name: content for name, content in contents(folder).items() if name != STATISTICS_FILE}


def start_from(init):
    model = make_lora_model(model=make_tiny_llama(name_or_path=BASE_NAME), target_modules=["q_proj", "v_proj"])
    return apply_init(model, init)


def test_a_start_needs_no_statistics_and_they_are_not_fetched(hub, init, push, pull):
    commit = push().commit
    forget(hub)
    pulled = pull(statistics=False, base_model=make_tiny_llama())
    assert contents(pulled.folder) == without_statistics(init)
    fetched = {seen.path.rsplit("/", 1)[-1] for seen in hub.seen(contains="/resolve/")}
    assert fetched == set(without_statistics(init))
    assert len(hub.seen(server="storage", method="GET")) == 2
    assert start_from(pulled).init_from == f"{REPO}@{commit}"
    forget(hub)
    assert pull(statistics=False, base_model=make_tiny_llama()).folder == pulled.folder
    assert not hub.seen(server="storage")
    assert pull(statistics=False, local_files_only=True).folder == pulled.folder


def test_init_from_fetches_no_statistics(hub, init, push, pull, monkeypatch):
    commit = push().commit
    monkeypatch.setattr(lora_da_hf.hub, "pull_init", pull)
    for name in (REPO, f"{REPO}@{commit}"):
        found = find_init(name, base_model_facts(make_tiny_llama(name_or_path=BASE_NAME)))
        assert contents(found.folder) == without_statistics(init)
        assert start_from(found).init_from == f"{REPO}@{commit}"
    assert not hub.seen(method="GET", contains=STATISTICS_FILE)


def test_a_pull_of_all_completes_what_a_start_fetched_and_a_start_uses_it(init, push, pull):
    push()
    start = pull(statistics=False).folder
    with pytest.raises(HubError, match="it is not completely in the cache, and the network is off"):
        pull(local_files_only=True)
    whole = pull().folder
    assert contents(whole) == contents(init)
    assert contents(start) == without_statistics(init)  # another process may be reading it
    damage(whole / STATISTICS_FILE)
    kept = written_when(whole)
    assert pull(statistics=False).folder == whole
    assert start_from(whole).artifact == str(whole)
    assert written_when(whole) == kept
    damage(whole / BASIS_FILE)
    assert pull(statistics=False).folder == start
    assert contents(pull().folder) == contents(init)


def test_a_folder_of_ones_own_without_statistics_is_completed_there(init, push, pull, tmp_path):
    push()
    mine = pull(statistics=False, local_dir=tmp_path / "mine").folder
    assert contents(mine) == without_statistics(init)
    assert contents(pull(local_dir=mine).folder) == contents(init)
    kept = written_when(mine)
    assert pull(statistics=False, local_dir=mine).folder == mine
    assert written_when(mine) == kept


def test_where_no_statistics_are_stored_there_is_one_folder(another, push, pull):
    push(another())
    assert pull(statistics=False).folder == pull().folder


def test_a_rank_is_cut_from_all_of_it(hub, pull):
    with pytest.raises(ConfigError, match="rank=2 is cut from all of an initialisation"):
        pull(rank=2, statistics=False)
    assert not hub.log


def test_what_a_start_fetches_is_checked(hub, init, push, pull):
    push()
    damage(hub.blob(load_init(init).manifest.files[BASIS_FILE].sha256))
    with pytest.raises(ArtifactError, match=f"{BASIS_FILE} has another SHA-256 than the manifest says"):
        pull(statistics=False)


@pytest.mark.parametrize(
    "words", [["verify", "FOLDER"], ["push", "FOLDER", "alice/two"], ["refit", "FOLDER", "NEW", "--rank", "2"]]
)
def test_verbs_that_need_all_of_it_name_what_is_missing(hub, push, pull, tmp_path, capfd, words):
    push()
    places = {"FOLDER": str(pull(statistics=False).folder), "NEW": str(tmp_path / "new")}
    forget(hub)
    assert main([places.get(word, word) for word in words]) == 1
    shown = " ".join(capfd.readouterr().err.split())
    assert f"{STATISTICS_FILE} is listed in the manifest and is not there as a file" in shown
    assert "Fetch all of it with `lora-da pull`" in shown
    assert not hub.log
    assert not (tmp_path / "new").exists()


def test_pulls_with_and_without_statistics_at_once(init, push, pull):
    push()
    results = []

    def run(statistics):
        try:
            results.append((statistics, contents(pull(statistics=statistics).folder)))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for statistics, found in results:
        assert {name: found[name] for name in without_statistics(init)} == without_statistics(init)
        assert not statistics or found == contents(init)


# A cache that cannot be written


@pytest.fixture
def make_read_only(monkeypatch):
    """Return ``make_read_only(number)``, after which no lock can be taken, for that reason."""

    def make_read_only(number):
        def refuse(path):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(lora_da_hf.hub.pull, "WeakFileLock", refuse)

    return make_read_only


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"statistics": False}])
def test_a_checked_folder_in_a_read_only_cache_is_used(push, pull, make_read_only, settings, number):
    push()
    folder = pull(**settings).folder
    before = written_when(folder.parent)
    make_read_only(number)
    assert pull(local_files_only=True, **settings).folder == folder
    assert pull(local_files_only=True, base_model=make_tiny_llama(), **settings).folder == folder
    assert written_when(folder.parent) == before


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"statistics": False}])
def test_what_is_not_complete_in_a_read_only_cache_is_not_used(push, pull, make_read_only, tmp_path, settings):
    push()
    folder = pull(**settings).folder
    make_read_only(errno.EROFS)
    damage(folder / BASIS_FILE)
    damaged = contents(folder)
    message = rf"lora_da cannot be written \(Read-only file system\), and has no complete {folder.name}\. Pull it once"
    with pytest.raises(HubError, match=message):
        pull(local_files_only=True, **settings)
    assert contents(folder) == damaged
    shutil.rmtree(folder)
    with pytest.raises(HubError, match=message):
        pull(local_files_only=True, **settings)
    assert pull(local_files_only=True, local_dir=tmp_path / "mine", **settings).folder == tmp_path / "mine"


def test_a_lock_that_fails_for_another_reason_is_an_error(push, pull, make_read_only):
    push()
    pull()
    make_read_only(errno.ENOLCK)
    with pytest.raises(HubError, match=r"Pulling alice/init failed: .*No locks available"):
        pull()


# Damage and tampering


def damage(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_damaged_cache_is_noticed_and_fetched_again(init, push, pull, tmp_path):
    pushed = push()
    folder = pull().folder
    (snapshot,) = (tmp_path / "cache").glob(f"*/snapshots/{pushed.commit}")
    for name in (ADAPTER_FILE, MANIFEST_FILE):
        shutil.rmtree(folder)
        damage((snapshot / name).resolve())
        with pytest.raises(ArtifactError, match=f"{name}.*changed"):
            pull(local_files_only=True)
        assert contents(pull().folder) == contents(init)


def test_a_checked_folder_that_was_changed_later_is_made_again(init, push, pull):
    push()
    folder = pull().folder
    (folder / REPORT_FILE).unlink()
    (folder / REPORT_FILE).write_text("{}")
    assert contents(pull().folder) == contents(init)


def test_a_blob_of_the_same_size_with_other_bytes_is_refused(hub, init, push, pull):
    push()
    damage(hub.blob(load_init(init).manifest.files[ADAPTER_FILE].sha256))
    with pytest.raises(ArtifactError, match=f"{ADAPTER_FILE} has another SHA-256 than the manifest says"):
        pull()


def republish(hub, change):
    """Change the files of the newest commit behind the client's back."""
    repo = hub.repos[REPO]
    change(repo.commits[repo.branches["main"]])


def test_a_tree_that_announces_another_file_is_refused_before_it_is_fetched(hub, push, pull):
    push()
    republish(hub, lambda files: files.update({ADAPTER_FILE: files[STATISTICS_FILE]}))
    forget(hub)
    with pytest.raises(ArtifactError, match=f"{ADAPTER_FILE} has size .* and its manifest says"):
        pull()
    assert not hub.seen(server="storage")


def test_a_tree_that_lacks_a_file_of_the_manifest_is_refused(hub, push, pull):
    push()
    republish(hub, lambda files: files.pop(REPORT_FILE))
    with pytest.raises(ArtifactError, match=f"has no {REPORT_FILE}, which its manifest lists"):
        pull()


def test_a_repo_without_a_manifest_is_no_initialisation(hub, push, pull):
    push()
    republish(hub, lambda files: files.pop(MANIFEST_FILE))
    with pytest.raises(HubError, match=f"has no {MANIFEST_FILE}: it holds no LoRA-DA initialisation"):
        pull()


def test_a_huge_manifest_is_not_fetched(hub, push, pull):
    push()
    republish(hub, lambda files: setattr(files[MANIFEST_FILE], "size", 1 << 30))
    with pytest.raises(ArtifactError, match=r"has 1,073,741,824 bytes, and at most 25,165,824 can be"):
        pull()


def test_what_the_manifest_does_not_list_is_not_fetched(hub, push, pull):
    push()
    extra = {name: File(size=4, content=b"evil") for name in ("adapter_model.bin", "../up.txt", "modeling.py")}
    republish(hub, lambda files: files.update(extra))
    forget(hub)
    assert not {"adapter_model.bin", "README.md", "modeling.py"} & {path.name for path in pull().folder.iterdir()}
    assert {seen.path.rsplit("/", 1)[-1] for seen in hub.seen(contains="/resolve/")} == {
        MANIFEST_FILE,
        *load_init(pull().folder).manifest.files,
    }


# The base, the rank, the folder


def test_another_base_is_refused_before_anything_large_is_fetched(hub, push, pull):
    push()
    forget(hub)
    with pytest.raises(BaseModelMismatchError, match="num_key_value_heads is 1 and was 2"):
        pull(base_model=make_tiny_llama(num_key_value_heads=1))
    with pytest.raises(BaseModelMismatchError, match="its weights have another fingerprint"):
        pull(base_model=make_tiny_llama(seed=1))
    assert not hub.seen(server="storage")
    assert pull(base_model=make_tiny_llama()).folder.exists()
    assert pull(base_model=base_model_facts(make_tiny_llama())).folder.exists()


def test_magnitudes_that_are_not_the_base_s_are_refused(hub, push, pull, tmp_path):
    def make(**lora):
        return make_lora_model(model=make_tiny_llama(name_or_path=BASE_NAME), target_modules=["q_proj"], **lora)

    folder = store_init(tmp_path / "dora", make(use_dora=True), save_statistics=False, step_size=0.1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    change_tensors(folder / ADAPTER_FILE, lambda tensors: tensors[key].mul_(50.0))
    forge_manifest(folder)
    push(folder)
    with pytest.raises(ArtifactError, match="lora_magnitude_vector' is not what follows from the base model"):
        pull(base_model=make().unload(), local_dir=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_base_can_be_loaded_for_the_adapter_s_task(hub, push, pull):
    push()
    forget(hub)
    asked = []

    def load(peft_config, **settings):
        asked.append(peft_config["target_modules"])
        return make_tiny_llama(**settings)

    with pytest.raises(BaseModelMismatchError, match="its weights have another fingerprint"):
        pull(base_model=lambda peft_config: load(peft_config, seed=1))
    assert not hub.seen(server="storage")
    assert pull(base_model=load, rank=2).folder.exists()
    assert sorted(asked[0]) == ["q_proj", "v_proj"]
    with pytest.raises(OSError, match="no such model"):
        pull(base_model=lambda _: (_ for _ in ()).throw(OSError("no such model")))


def test_a_rank_that_is_not_stored_is_refused_before_anything_large_is_fetched(hub, push, pull):
    push()
    forget(hub)
    with pytest.raises(ConfigError, match="rank=7 cannot be taken from this initialisation: ask for one from 1 to 6"):
        pull(rank=7)
    assert not hub.seen(server="storage")


def test_another_rank_is_cut_from_the_checked_folder(push, pull, tmp_path):
    commit = push().commit
    folder = pull(rank=2).folder
    assert folder.name == f"{commit}-rank-2"
    assert {layer.rank for layer in load_init(folder).manifest.layers.values()} == {2}
    assert pull(rank=2, local_dir=tmp_path / "mine").folder == tmp_path / "mine"
    assert load_init(tmp_path / "mine").report.step_size == load_init(folder).report.step_size


@pytest.mark.parametrize("rank", [None, 2])
def test_what_a_killed_pull_left_is_removed(push, pull, tmp_path, rank):
    push()
    for name in ("_mine.partial-x", "_mine.old-x", *([] if rank is None else [".mine.whole-x"])):
        (tmp_path / name / "mine").mkdir(parents=True)
    before = {path.name for path in tmp_path.iterdir() if not path.name.startswith((".mine", "_mine"))}
    pull(rank=rank, local_dir=tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == before | {"mine", "cache"}


def written_when(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


@pytest.mark.parametrize("own", [False, True])
def test_a_rank_is_cut_once(push, pull, tmp_path, own):
    push()
    settings = {"rank": 2, **({"local_dir": tmp_path / "mine"} if own else {})}
    folder = pull(**settings).folder
    before = written_when(folder)
    assert pull(**settings).folder == folder
    assert pull(local_files_only=True, **settings).folder == folder
    assert written_when(folder) == before
    kept = contents(folder)
    damage(folder / ADAPTER_FILE)
    pull(**settings)
    assert contents(folder)[ADAPTER_FILE] == kept[ADAPTER_FILE]


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 2, "step_size": 0.7}])
def test_what_is_no_cut_of_that_rank_is_cut_again(push, pull, tmp_path, change):
    push()
    whole, mine = pull().folder, tmp_path / "mine"
    pull(rank=2, local_dir=mine)
    kept = contents(mine)[ADAPTER_FILE]
    refit_init(whole, mine, **change)
    if "step_size" in change:  # somebody's own
        with pytest.raises(ConfigError, match="holds another initialisation"):
            pull(rank=2, local_dir=mine)
    pull(rank=2, local_dir=mine, overwrite="step_size" in change)
    assert contents(mine)[ADAPTER_FILE] == kept


@pytest.mark.parametrize("rank", [None, 2])
def test_a_folder_of_ones_own_needs_no_cache_that_can_be_written(init, push, pull, tmp_path, rank):
    push()
    pull()
    (checked,) = (tmp_path / "cache").glob("*/lora_da")
    shutil.rmtree(checked)
    checked.write_text("in the way")
    folder = pull(local_dir=tmp_path / "mine", rank=rank, local_files_only=True).folder
    assert {layer.rank for layer in load_init(folder).manifest.layers.values()} == {rank or 4}
    assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == ["mine"]
    with pytest.raises(HubError, match="Pulling alice/init failed"):
        pull(rank=rank, local_files_only=True)


def test_a_folder_of_ones_own_is_a_copy_and_the_cache_keeps_nothing_else(init, push, pull, tmp_path):
    push()
    mine = pull(local_dir=tmp_path / "mine").folder
    assert mine == tmp_path / "mine"
    assert contents(mine) == contents(init)
    assert {path.stat().st_nlink for path in mine.iterdir()} == {1}
    assert not list((tmp_path / "cache").glob(f"**/lora_da/**/{ADAPTER_FILE}"))


def test_another_initialisation_is_replaced_on_request_alone(another, push, pull, tmp_path):
    push()
    mine = another()
    kept = contents(mine)
    for settings in ({}, {"rank": 2}):
        with pytest.raises(ConfigError, match=r"holds another initialisation, which would be lost.*overwrite=True"):
            pull(local_dir=mine, **settings)
        assert contents(mine) == kept
    assert contents(pull(local_dir=mine, overwrite=True).folder) == contents(pull().folder)


def test_an_initialisation_that_this_version_cannot_read_is_not_replaced(push, pull, tmp_path):
    push()
    mine = pull(local_dir=tmp_path / "mine").folder
    path = mine / "lora_da_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ConfigError, match="holds another initialisation"):
        pull(local_dir=mine)


def test_a_folder_with_something_else_is_not_replaced(push, pull, tmp_path):
    push()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds something else than an initialisation"):
        pull(local_dir=folder)
    (folder / "lora_da_manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds something else than an initialisation"):
        pull(local_dir=folder)
    (folder / "thesis.tex").unlink()
    (folder / "lora_da_manifest.json").unlink()
    assert pull(local_dir=folder).folder == pull(local_dir=folder).folder == folder


def test_the_checked_folder_in_the_cache_takes_no_space(push, pull):
    push()
    folder = pull().folder
    assert {path.stat().st_nlink for path in folder.iterdir()} == {2}
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_revision_that_is_not_there(push, pull):
    push()
    with pytest.raises(HubError, match="Pulling alice/init@v9 failed: the repo has no such branch, tag or commit"):
        pull(revision="v9")


def test_an_empty_revision_is_an_error(hub, pull):
    with pytest.raises(ConfigError, match=r"The revision of alice/init is empty. Give a branch, tag or commit"):
        pull(revision="")
    assert not hub.log


def test_a_name_with_a_revision_in_it_is_an_error(pull):
    with pytest.raises(HubError, match=r"Pulling alice/init@v1 failed: .*Correct that and try again"):
        pull("alice/init@v1")


def test_a_name_that_is_none(pull):
    with pytest.raises(HubError, match=r"Pulling \.\./x failed: .*Correct that and try again"):
        pull("../x")


# Against the environment


def test_endpoint_and_token_come_from_the_environment_and_offline_too(hub, push, tmp_path):
    pushed = push()
    script = (
        "from lora_da_hf.hub import pull_init, list_inits\n"
        f"print(pull_init({REPO!r}, cache_dir={str(tmp_path / 'cache')!r}).commit)\n"
    )
    names = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **names, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(script, **more):
        return subprocess.run(
            [sys.executable, "-c", script], env={**environment, **more}, capture_output=True, text=True, check=False
        )

    found = run(script + "print(*[init.repo_id for init in list_inits()])", HF_TOKEN="hf_alice")
    assert found.stdout.split() == [pushed.commit, REPO], found.stderr
    hub.close()
    assert run(script, HF_HUB_OFFLINE="1").stdout.split() == [pushed.commit]
    listing = "from lora_da_hf.hub import list_inits\nlist_inits()"
    assert "the network is off (HF_HUB_OFFLINE), and this needs the Hub" in run(listing, HF_HUB_OFFLINE="1").stderr


# Listing


def test_listing_finds_what_one_may_see(hub, push):
    first = push(repo_id="alice/one", private=False)
    push(repo_id="alice/two")
    make_base(hub, "license: mit")

    def names(**settings):
        return [i.repo_id for i in list_inits(endpoint=hub.endpoint, **{"token": "hf_alice", **settings})]

    assert names() == ["alice/one", "alice/two"]
    assert names(token=False) == ["alice/one"]
    assert names(base_model="org/base", limit=1) == ["alice/one"]
    assert names(base_model="org/other") == names(author="bob") == []
    (found,) = list_inits(endpoint=hub.endpoint, token=False)
    assert (found.commit, found.private, found.base_model, found.rank) == (first.commit, False, "org/base", 4)
    assert {"lora-da", "lora-init", "base_model:adapter:org/base"} <= set(found.tags)


@pytest.mark.parametrize("rank", ["'4'", "[1]", "1.5", "{}", "true"])
def test_what_a_card_says_is_not_trusted(hub, push, rank):
    card = f"---\ntags: [lora-da, lora-init]\nbase_model: ['a\\e[31m']\nlora_da: {{rank: {rank}}}\n---\n"
    push(card=card.replace("'a", '"a').replace("m'", 'm"'))
    (found,) = list_inits(endpoint=hub.endpoint, token="hf_alice")
    assert (found.rank, found.base_model) == (None, None)


# Large files


@pytest.mark.slow
def test_200_megabytes_go_both_ways_in_parts(hub, init, push, pull):
    config = json.loads((init / "adapter_config.json").read_text())
    (init / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    large = torch.randn(50, 1 << 20)
    change_tensors(init / ADAPTER_FILE, lambda tensors: tensors.update({"base_model.model.lm_head.weight": large}))
    forge_manifest(init)
    assert (init / ADAPTER_FILE).stat().st_size > 200_000_000
    hub.multipart_above = 64 << 20
    push()
    assert len(hub.seen(server="storage", method="PUT", contains=".part")) == 4
    hub.cuts_left = 1
    folder = pull().folder
    assert (folder / ADAPTER_FILE).read_bytes() == (init / ADAPTER_FILE).read_bytes()
