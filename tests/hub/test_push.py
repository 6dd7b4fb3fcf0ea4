"""Publishing: one commit or none, only where it belongs, and with the licence stated as it is."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from local_hub import STATISTICS_FILE, Repo

from lora_da_hf.artifacts.manifest import ADAPTER_FILE, MANIFEST_FILE
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.errors import ConfigError, HubError

REPO = "alice/init"


def card_of(hub):
    return hub.repos[REPO].files["README.md"].decode()


def metadata_of(hub):
    return yaml.safe_load(card_of(hub).split("---\n")[1])


def make_repo(hub, files, repo_id=REPO):
    repo = hub.repos[repo_id] = Repo(repo_id, private=repo_id == REPO)
    repo.commit({name: content.encode() for name, content in files.items()})
    return repo


def make_base(hub, metadata):
    return make_repo(hub, {"README.md": f"---\n{metadata}\n---\n"}, "org/base")


def pictures(hub):
    return {name for name in hub.repos[REPO].files if name.endswith(".png")}


# One commit


def test_a_push_is_one_commit_with_everything(hub, push, init):
    (init / "LICENSE").write_bytes(b"Do good.")
    pushed = push()
    repo = hub.repos[REPO]
    assert list(repo.commits)[2:] == []
    assert repo.refs == {"main": pushed.oid}
    assert {"README.md", "LICENSE", MANIFEST_FILE, ADAPTER_FILE, STATISTICS_FILE} <= set(repo.files)
    assert (pushed.repo_url.repo_id, pushed.pr_url) == (REPO, None)
    assert pushed.commit_url == f"{hub.endpoint}/{REPO}/commit/{pushed.oid}"


def test_a_push_without_changes_makes_no_commit(hub, push):
    first = push()
    again = push(repo_id="init")  # one's own
    assert (again.repo_url.repo_id, again.oid) == (REPO, first.oid)


def test_a_second_push_removes_what_the_first_had_and_leaves_what_others_have(hub, push, another):
    push()
    others = {"lora_da_results.md", "eval/table.csv", f"old/{STATISTICS_FILE}"}
    hub.repos[REPO].commit({**hub.repos[REPO].files, **dict.fromkeys((*others, "guidance_spectra.png"), b"our own")})
    push(another)
    assert others <= set(hub.repos[REPO].files)
    assert STATISTICS_FILE not in hub.repos[REPO].files
    assert pictures(hub) == {"guidance_spectra.png"}


def test_a_push_to_a_branch_and_a_pull_request_leave_main(hub, push, another):
    first = push()
    hub.repos[REPO].refs["trial"] = first.oid
    branch = push(another, revision="trial")
    proposed = push(another, create_pr=True)
    assert proposed.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.repos[REPO].refs == {"main": first.oid, "trial": branch.oid, "refs/pr/1": proposed.oid}
    with pytest.raises(HubError, match="no such branch"):
        push(revision="elsewhere")


def test_of_two_writers_at_once_one_wins(hub, init, another, push):
    push()
    hub.before_commit = threading.Barrier(2, timeout=30).wait

    def write(name):
        try:
            return push(another, notes=[name]).oid
        except HubError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        results = list(threads.map(write, ("one", "two")))
    assert hub.repos[REPO].refs["main"] in results
    assert sum("somebody else pushed meanwhile" in result for result in results) == 1


# Where it may go


@pytest.mark.parametrize(
    "names",
    [["README.md"], ["adapter_config.json", "adapter_model.safetensors"], ["training_args.bin", MANIFEST_FILE]],
)
@pytest.mark.parametrize("settings", [{}, {"create_pr": True}])
def test_a_push_does_not_take_over_a_repo_that_holds_something_else(hub, push, names, settings):
    head = make_repo(hub, dict.fromkeys(names, "somebody's own")).refs["main"]
    with pytest.raises(HubError, match=names[0]):
        push(**settings)
    assert hub.repos[REPO].refs == {"main": head}


def test_a_push_to_a_repo_with_a_licence_alone(hub, push):
    make_repo(hub, {"LICENSE": "Do good.", ".gitattributes": ""})
    assert push().oid == hub.repos[REPO].refs["main"]


def test_a_repo_that_is_public_or_private_against_the_wish_is_refused_before_anything_is_sent(hub, push, another):
    hub.default_public = True
    with pytest.raises(HubError, match="is public"):
        push()
    assert len(hub.repos[REPO].commits) == 1
    hub.repos[REPO].private = True
    with pytest.raises(HubError, match="is private"):
        push(private=False, license="mit")
    assert len(hub.repos[REPO].commits) == 1


def test_somebody_elses_repo_cannot_be_written(push):
    push(private=False, license="mit")
    with pytest.raises(HubError, match=r"does not allow it \(403\)"):
        push(token="hf_bob", private=False, license="mit", notes=["Another one."])


# Card and licence


@pytest.mark.parametrize(("given", "stated"), [("mit", "mit"), (None, "apache-2.0")])
def test_the_card_states_the_base_s_licence_as_the_hub_has_it(hub, push, given, stated):
    make_base(hub, "license: apache-2.0")
    push(license=given)
    licences = card_of(hub).split("## Licences\n")[1].split("\n## ")[0]
    assert metadata_of(hub)["license"] == stated
    (of_base,) = [line for line in licences.splitlines() if "base model" in line]
    assert "apache-2.0" in of_base
    assert "mit" not in of_base
    assert f"`{stated}`" in licences


@pytest.mark.parametrize("known", [False, True])
def test_a_public_push_needs_a_licence_of_its_own_or_of_the_base(hub, push, known):
    make_base(hub, "license: mit" if known else "license: [x]")
    if not known:
        with pytest.raises(HubError, match="--license"):
            push(private=False)
        assert REPO not in hub.repos
    push(private=False, license=None if known else "mit")
    assert not hub.repos[REPO].private
    assert metadata_of(hub)["license"] == "mit"


def test_a_licence_called_other_comes_with_its_name_and_link(hub, push, init):
    make_base(hub, "license: other\nlicense_name: own\nlicense_link: LICENSE")
    push()
    found = metadata_of(hub)
    link = "https://huggingface.co/org/base/blob/main/LICENSE"
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "own", link)
    theirs = {"license": "other", "license_name": "theirs", "license_link": "LICENSE"}
    (init / "LICENSE").write_bytes(b"Do good.")
    push(**theirs)
    assert {name: metadata_of(hub)[name] for name in theirs} == theirs
    push(license="mit")
    assert not {"license_name", "license_link"} & set(metadata_of(hub))


def test_what_is_said_for_the_card_is_on_it(hub, push):
    facts = {"datasets": ["org/data", "own notes"], "language": ["en"], "hardware": "a large machine"}
    push(license="mit", base_model="org/other", notes=["For short texts."], **facts)
    found, card = metadata_of(hub), card_of(hub)
    assert (found["base_model"], found["datasets"], found["language"]) == ("org/other", ["org/data"], ["en"])
    assert all(text in card for text in (f"# {REPO}", "own notes", "a large machine", "For short texts."))


def test_a_base_from_a_folder_gets_its_name_on_the_hub(hub, push, pull, init):
    push(base_model="org/other")
    pulled = pull()
    assert pulled.manifest.base_model.name_or_path == pulled.peft_config["base_model_name_or_path"] == "org/other"
    assert pulled.manifest.base_model.weights_sha256 == load_init(init).manifest.base_model.weights_sha256
    assert "local copy" not in card_of(hub)


def test_a_card_that_cannot_be_is_refused_before_the_repo_is_made(hub, push):
    with pytest.raises(ConfigError, match="base_model"):
        push(base_model="/home/me/model")
    assert REPO not in hub.repos
