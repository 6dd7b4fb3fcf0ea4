"""Cards: their metadata, their text, and what they are made of when facts are missing or hostile."""

import itertools
import re

import pytest
import yaml
from card_facts import LAYERS, make_init, make_report
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_da_hf import LoRADAConfig
from lora_da_hf.artifacts.folders import PLOT_FILE
from lora_da_hf.artifacts.manifest import RefittedFrom
from lora_da_hf.errors import ConfigError
from lora_da_hf.hub.cards import render_card, render_page

PARSER = MarkdownIt("commonmark").enable("table")
SECTIONS = ["Use it", "Does it help?", "How it was computed", "Limits and privacy", "Licences", "Versions and citation"]
HOSTILE = '`|<script>\n---\n# x\n[a](http://e.example)!![b](c)\u202e{{ x }}"); import os; ("'


def files_of(kind):
    return {f"{kind}-00000.safetensors": {"size": 8, "sha256": "0" * 64}}


def split(card):
    _, metadata, body = card.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_metadata_says_what_the_hub_filters_by():
    card = render_card(make_init(), license="apache-2.0", datasets=["gsm8k", "our own notes"], language=["en"])
    metadata, _ = split(card)
    assert metadata == ModelCard(card).data.to_dict()
    assert metadata == {
        "base_model": "org/base-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "datasets": ["gsm8k"],
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "lora-da", "lora-init", "base_model:adapter:org/base-model"],
        "lora_da": {"schema_version": 2, "rank": 4, "max_rank": 8, "n_samples": 12},
    }


def test_the_page_is_the_card_and_the_plot_that_it_shows(caplog, monkeypatch):
    init = make_init()
    page = render_page(init, license="mit")
    assert list(page) == ["README.md", PLOT_FILE]
    assert re.findall(r"!\[[^]]+\]\((.+)\)", page["README.md"].decode()) == [PLOT_FILE]
    assert "![" not in render_card(init)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert list(render_page(init)) == ["README.md"]
    assert "matplotlib" in caplog.text


# ----------------------------------------------------------------------------------------------- missing facts

BASES = [
    {},
    {"name_or_path": "/home/somebody/model", "revision": None, "weights_sha256": None},
    {"name_or_path": None, "revision": None, "weights_sha256": None},
]
REPORTS = [
    {},
    {"unseen_loss_before": None, "unseen_loss_after": None, "kept": {}, "step_size": None},
    {"search": [], "search_loss_before": None, "search_loss_after": None, "seconds": {}, "loss_reduction": ""},
]
ADAPTERS = [{}, {"task_type": None, "target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj"]}]
ARGUMENTS = [
    {},
    {"license": "other", "license_name": "own", "base_license": "mit", "repo_id": "user/init", "datasets": ["gsm8k"]},
    {"license": "other", "license_link": "LICENSE", "language": ["en", "zho"], "hardware": "a GPU", "notes": ["A."]},
]


@pytest.mark.parametrize("base", BASES, ids=["hub", "local", "unnamed"])
def test_no_value_is_undefined_whatever_is_missing(base):
    for report, adapter, arguments in itertools.product(REPORTS, ADAPTERS, ARGUMENTS):
        init = make_init(base_model=base, report=make_report(**report), adapter=adapter)
        metadata, body = split(render_card(init, **arguments))
        assert None not in [*metadata.values(), *metadata["lora_da"].values()]
        settings = "\n".join(line for line in body.splitlines() if not re.match(r"\| `\w+` \| ", line))
        assert not re.search(r"\b(None|nan|inf|Undefined|null)\b|\{\{|\}\}|\{%|/home", settings)
        assert re.findall(r"^## (.+)$", body, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"report": {"unseen_loss_after": None}}, "Not measured."),
        ({"report": {"unseen_loss_before": -1.0, "unseen_loss_after": -2.0}}, "(-100.0 %)"),
        ({"report": {"unseen_loss_before": -2.0, "unseen_loss_after": -1.0}}, "(+50.0 %)"),
        ({"report": {"step_size": 0.0}}, "the adapter changes nothing at step 0"),
        ({"report": {"step_size": 0.0, "unseen_loss_before": None}}, "**No step earned its length on the samples, so"),
        ({"adapter": {"modules_to_save": ["score"]}}, "as plain LoRA has it, and the same head ("),
        ({"report": {"step_size": 0.3}}, "The adapter changes the model at step 0 already"),
        ({"base_model": {"weights_sha256": None}}, "The base's weights have no fingerprint"),
        ({"refitted_from": RefittedFrom(manifest="sha256:0")}, "refitted from another initialisation"),
        ({"files": files_of("lora_da_leading")}, "`lora-da refit FOLDER NEW --da_start gradient`"),
        ({"files": files_of("lora_da_statistics")}, "`lora-da export FOLDER FILE --to eva`"),
        (
            {"report": {"config": {**LoRADAConfig().to_dict(), "freeze_a": True}}},
            "da_config=LoRADAConfig(freeze_a=True),",
        ),
    ],
)
def test_what_is_special_is_said(change, expected):
    report = make_report(**change.pop("report", {}))
    assert expected in render_card(make_init(report=report, **change))
    if "Not" not in expected and "already" not in expected:
        assert expected not in render_card(make_init())


# --------------------------------------------------------------------------------------------------- hostile facts


def test_hostile_text_stays_text():
    report = make_report(
        [f"{name}{HOSTILE}" for name in LAYERS],
        notes=[HOSTILE],
        loss_reduction=HOSTILE,
        kept={HOSTILE: HOSTILE},
        config={**LoRADAConfig().to_dict(), HOSTILE: HOSTILE},
    )
    base = {"name_or_path": HOSTILE, "revision": HOSTILE}
    adapter = {"task_type": HOSTILE, "modules_to_save": [HOSTILE], "bias": HOSTILE, "target_modules": [HOSTILE]}
    init = make_init(base_model=base, report=report, adapter=adapter, versions={HOSTILE: HOSTILE})
    metadata, body = split(render_card(init, datasets=[HOSTILE], hardware=HOSTILE, notes=[HOSTILE]))
    assert set(metadata) == {"library_name", "tags", "lora_da"}
    tokens = list(PARSER.parse(body))
    children = [child for token in tokens for child in token.children or []]
    assert not {token.type for token in [*tokens, *children]} & {"html_block", "html_inline", "image"}
    links = [child.attrs["href"] for child in children if child.type == "link_open"]
    assert set(links) == {"https://arxiv.org/abs/2510.24561"}
    headings = [token.content for after, token in itertools.pairwise(tokens) if after.type == "heading_open"]
    assert headings == ["LoRA-DA initialisation", *SECTIONS]
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "bibtex"]


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/model", None, "org/model"),
        ("./checkpoints/model", None, None),
        ("gpt2", "c" * 40, "gpt2"),
        ("gpt2", None, None),
        ("/home/somebody/model", None, None),
        ("a b/c", "c" * 40, None),
    ],
)
def test_only_names_on_the_hub_become_the_base_model(name, revision, expected):
    init = make_init(base_model={"name_or_path": name, "revision": revision})
    assert split(render_card(init))[0].get("base_model") == expected


def test_a_local_copy_can_be_named():
    init = make_init(base_model={"name_or_path": "/home/somebody/copy", "revision": None})
    metadata, body = split(render_card(init, base_model="org/model"))
    assert metadata["base_model"] == "org/model"
    assert "from a local copy named `copy`" in body
    assert "/home" not in body


def test_names_that_the_hub_does_not_allow_are_refused():
    with pytest.raises(ConfigError, match="base_model"):
        render_card(make_init(), base_model="a b")


# ----------------------------------------------------------------------------------------------- the lines of use


def test_the_lines_of_use_take_the_stored_config_and_a_classifier_s_labels():
    assert "peft_config=LoraConfig.from_pretrained('user/init')" in render_card(make_init(), repo_id="user/init")
    card = render_card(make_init(adapter={"task_type": "SEQ_CLS", "modules_to_save": ["score"]}))
    assert "AutoModelForSequenceClassification.from_pretrained('org/base-model', revision='" in card
    assert ", num_labels=NUM_LABELS),\n" in card


def test_the_card_loads_the_base_by_the_class_of_the_task_or_leaves_that_to_you():
    text = render_card(make_init(adapter={"task_type": "TOKEN_CLS"}))
    assert "import AutoModelForTokenClassification\n" in text
    assert "model=AutoModelForTokenClassification.from_pretrained(" in text
    text = render_card(make_init(adapter={"task_type": None}))
    assert "\n# model, args" in text
    assert "    model=model,\n    args=args,\n" in text
    assert "AutoModel" not in text
