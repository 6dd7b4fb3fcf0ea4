"""Cards: their metadata, their text, and what they are made of when facts are missing or hostile."""

import dataclasses
import itertools
import json
import re
import typing
from types import SimpleNamespace

import jinja2
import pytest
import torch
import yaml
from card_facts import COMMIT, LAYERS, make_manifest, make_report
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt
from peft import LoraConfig
from safetensors.torch import save_file

from lora_da_hf import LoRADAConfig, LoRADAReport
from lora_da_hf.artifacts.card_files import SEARCH_PLOT, SPECTRA_PLOT
from lora_da_hf.errors import ArtifactError, CardError, ConfigError, MissingDependencyError
from lora_da_hf.hub import cards
from lora_da_hf.hub.cards import card_metadata, card_plots, render_card
from lora_da_hf.hub.facts import CardFacts

PARSER = MarkdownIt("commonmark").enable("table")
SECTIONS = [
    "Use it",
    "Compatible if",
    "How it was computed",
    "Does it help?",
    "Diagnostics",
    "Files",
    "Cost and hardware",
    "Privacy",
    "Limits",
    "Licences",
    "Versions and command",
    "Citation",
]
HOSTILE = '`|<script>\n---\n# x\n[a](http://e.example)!![b](c)\u202e{{ x }}"); import os; ("'


def split(card):
    _, metadata, body = card.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_metadata_says_what_the_hub_filters_by(stored, tmp_path):
    card = render_card(stored(), license="apache-2.0", datasets=["gsm8k", "our own notes"], language=["en"])
    (tmp_path / "card.md").write_text(card, encoding="utf-8")
    metadata = metadata_load(tmp_path / "card.md")
    files = {"adapter_model.safetensors": "a" * 64, "lora_da_report.json": "a" * 64}
    assert metadata == {
        "base_model": "org/base-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "datasets": ["gsm8k"],
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "lora-da", "lora-init", "base_model:adapter:org/base-model"],
        "lora_da": {
            "schema_version": 2,
            "kind": "lora-da-init",
            "rank": 4,
            "max_rank": 8,
            "alpha": 16,
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "base_revision": "b" * 40,
            "base_fingerprint": "f" * 64,
            "n_samples": 12,
            "n_tokens": 345,
            "seed": 42,
            "files": files,
        },
    }


def test_the_clients_own_card_classes_accept_it(stored):
    card = ModelCard(render_card(stored(), license="apache-2.0"))
    assert card.data.base_model == "org/base-model"
    assert "eval_results" not in ModelCardData(**card.data.to_dict()).to_dict()


def test_sections_come_in_their_order(stored):
    card = render_card(stored(), license="apache-2.0")
    assert re.findall(r"^## (.+)$", card, re.MULTILINE) == SECTIONS
    assert card.index("not a trained adapter") < card.index("| Base model |") < card.index("## Use it")


def test_numbers_are_those_of_manifest_and_report(stored):
    card = render_card(
        stored(), license="apache-2.0", repo_id="user/init", commit=COMMIT, hardware="two cores", notes=["It is small."]
    )
    for fact in (
        f'init_from="user/init@{COMMIT}"',
        f'from_pretrained("org/base-model", revision="{"b" * 40}")',
        "3 samples that neither the statistics nor the step search saw",
        "**2.4000** with this initialisation and **3.0000** with plain LoRA",
        "(-20.0 %)",
        "any rank up to 8",
        "`q_proj` x 3",
        "| statistics | 3.2 s |",
        "Computed on two cores.",
        "- It is small.",
        "1.7 to 2.4 of 8",
        "- `lm_head`: not a linear layer",
        "| `adapter_model.safetensors` | 3.3 MiB |",
    ):
        assert fact in card


def test_where_the_step_is_from_is_said(stored):
    assert "| step | 0.3, by a line search on 4 samples" in render_card(stored(), license=None)
    refitted = stored(manifest=make_manifest(refitted_from={"created": "x", "manifest": "sha256:0"}))
    assert "| step | 0.3, from the stored steps |" in render_card(refitted, license=None)


def test_plots_are_shown_only_if_they_are_there(stored):
    init = stored()
    assert "![" not in render_card(init, license=None)
    plots = card_plots(init)
    assert set(plots) == {SPECTRA_PLOT, SEARCH_PLOT}
    images = re.findall(r"!\[[^]]+\]\((.+)\)", render_card(init, license=None, plots=plots))
    assert images == [SPECTRA_PLOT, SEARCH_PLOT]


def test_without_matplotlib_the_card_has_no_plots_and_that_is_logged(stored, monkeypatch, caplog):
    def refuse(report):
        raise MissingDependencyError("Plots need matplotlib.")

    monkeypatch.setattr(cards, "draw_plots", refuse)
    assert card_plots(stored()) == {}
    assert "The card has no plots. Plots need matplotlib." in caplog.text


# ----------------------------------------------------------------------------------------------- missing facts

ARGUMENTS = {
    "license": [{"license": None}, {"license": "apache-2.0"}],
    "repository": [{}, {"repo_id": "user/init"}, {"repo_id": "user/init", "commit": COMMIT}],
    "data": [{}, {"datasets": ["gsm8k", "notes"], "language": ["en", "zho"]}],
    "rest": [{}, {"hardware": "a GPU", "notes": ["A note."], "plots": [SPECTRA_PLOT, SEARCH_PLOT]}],
}
BASES = [
    {"name_or_path": "org/base-model", "revision": "b" * 40, "config": {}, "weights_sha256": "f" * 64},
    {"name_or_path": "/home/somebody/model", "revision": None, "config": {}, "weights_sha256": None},
    {"name_or_path": None, "revision": None, "config": {}, "weights_sha256": None},
    {},
]
MANIFESTS = [
    {},
    {"kept": {}, "step_size": None},
]
REPORTS = [
    {},
    {"unseen_loss_before": None, "unseen_loss_after": None},
    {"unseen_loss_after": None, "search": [], "search_loss_before": None, "search_loss_after": None},
    {"seconds": {}, "notes": [], "loss_reduction": "", "step_size": None, "search": []},
]
ADAPTERS = [{}, {"task_type": None, "target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj"]}]


@pytest.mark.parametrize("base", BASES, ids=["hub", "local", "unnamed", "nothing"])
def test_no_value_is_undefined_whatever_is_missing(stored, base):
    for manifest, report, adapter in itertools.product(MANIFESTS, REPORTS, ADAPTERS):
        init = stored(
            manifest=make_manifest(**manifest, base_model=base), report=make_report(**report), adapter=adapter
        )
        for arguments in itertools.product(*ARGUMENTS.values()):
            card = render_card(init, **{name: value for part in arguments for name, value in part.items()})
            metadata, body = split(card)
            ModelCardData(**metadata)
            assert None not in metadata.values()
            assert None not in metadata["lora_da"].values()
            assert not re.search(r"\b(None|nan|inf|Undefined|null)\b|\{\{|\}\}|\{%|/home", body)
            assert re.findall(r"^## (.+)$", body, re.MULTILINE) == SECTIONS


OPTIONAL = {
    "facts.base_id": ["org/base-model", None],
    "facts.base_name": ["copy", None],
    "facts.base_revision": ["b" * 40, None],
    "facts.base_fingerprint": ["f" * 64, None],
    "facts.num_labels": [3, None],
    "facts.task_type": ["CAUSAL_LM", None],
    "facts.step_size": [0.3, None],
    "facts.config": [LoRADAConfig(), LoRADAConfig(step_size=None)],
    "facts.kept": [{"lm_head": "not a linear layer"}, {}],
    "facts.uses_rslora": [True, False],
    "facts.has_statistics": [True, False],
    "report.unseen_loss_before": [3.0, None],
    "report.unseen_loss_after": [2.0, None],
    "report.search_loss_before": [3.0, None],
    "report.search_loss_after": [2.0, None],
    "report.seconds": [{"solve": 1.0}, {}],
    "report.notes": [["A note."], []],
    "report.loss_reduction": ["token_mean", ""],
    "license": ["apache-2.0", "other", None],
    "license_name": ["own", None],
    "license_link": ["https://example.org", None],
    "base_license": ["apache-2.0", None],
    "repo_id": ["user/init", None],
    "commit": [COMMIT, None],
    "datasets": [["gsm8k"], []],
    "language": [["en"], []],
    "hardware": ["a GPU", None],
    "notes": [["A note."], []],
    "plots": [[SPECTRA_PLOT, SEARCH_PLOT], [SPECTRA_PLOT], [SEARCH_PLOT], []],
    "command": ["lora-da init", None],
}
SET_AT_THE_TOP = {"base": ["facts.base_id", "facts.base_name"], "where": ["repo_id"]}


@pytest.fixture
def context(stored, monkeypatch):
    """Return the environment, and everything that the template is given."""
    given = {}
    environment = cards._environment()
    recorder = SimpleNamespace(get_template=lambda name: SimpleNamespace(render=lambda **names: given.update(names)))
    with monkeypatch.context() as patch:
        patch.setattr(cards, "_environment", lambda: recorder)
        render_card(stored(), license=None)
    return environment, given


def test_no_section_has_an_undefined_value_for_any_combination_of_missing_facts(context):
    environment, given = context
    source, *_ = environment.loader.get_source(environment, cards._TEMPLATE)
    top, *sections = re.split(r"(?m)^(?=## )", source)
    settings = "\n".join(re.findall(r"(?m)^\{% set .*$", top))
    mentioned = set()
    for text in [top, *(f"{settings}\n{section}" for section in sections)]:
        template = environment.from_string(text)
        names = mentioned_in(text.removeprefix(settings))
        mentioned |= names
        for values in itertools.product(*(OPTIONAL[name] for name in sorted(names))):
            chosen = dict(zip(sorted(names), values, strict=True))
            found = template.render(**with_values(given, chosen))
            assert not re.search(r"\b(None|nan|Undefined|null)\b|\{\{|\}\}|\{%", found), chosen
    assert mentioned == set(OPTIONAL) - {"facts.task_type"}


def mentioned_in(text):
    """Return the optional facts that a part of the template asks for."""
    tags = " ".join(re.findall(r"\{[{%](.*?)[%}]\}", text))

    def asks_for(name):
        return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", tags)

    behind = {name for short, names in SET_AT_THE_TOP.items() if asks_for(short) for name in names}
    return behind | {name for name in OPTIONAL if asks_for(name)}


def with_values(given, chosen):
    changes = {"facts": {}, "report": {}, "": {}}
    for name, value in chosen.items():
        owner, _, field = name.rpartition(".")
        changes[owner][field] = value
    report = dataclasses.replace(given["report"], **changes["report"])
    facts = dataclasses.replace(given["facts"], report=report, **changes["facts"])
    return {**given, "facts": facts, "report": report, **changes[""]}


def test_whatever_may_be_none_is_tried_without(context):
    source = context[0].loader.get_source(context[0], cards._TEMPLATE)[0]
    for owner, kind in (("facts", CardFacts), ("report", LoRADAReport)):
        hints = typing.get_type_hints(kind)
        optional = {f"{owner}.{name}" for name, hint in hints.items() if type(None) in typing.get_args(hint)}
        assert {name for name in optional if name in source} <= set(OPTIONAL)


def test_metadata_has_no_undefined_value_for_any_combination_of_missing_facts(context):
    facts = context[1]["facts"]
    of_facts = ["base_id", "base_revision", "base_fingerprint", "task_type"]
    others = ["license", "license_name", "license_link", "datasets", "language"]
    choices = [*(OPTIONAL[f"facts.{name}"] for name in of_facts), *(OPTIONAL[name] for name in others)]
    for values in itertools.product(*choices):
        chosen = dict(zip([*of_facts, *others], values, strict=True))
        changed = dataclasses.replace(facts, **{name: chosen.pop(name) for name in of_facts})
        metadata = card_metadata(changed, **chosen)
        ModelCardData(**metadata)
        assert not any(value is None or value == [] for value in [*metadata.values(), *metadata["lora_da"].values()])


def test_not_measured_is_said(stored):
    card = render_card(stored(report=make_report(unseen_loss_after=None)), license=None)
    assert "Not measured." in card
    assert "This initialisation has no licence yet." in card


def test_the_template_is_rendered_strictly(stored, monkeypatch):
    monkeypatch.setattr(cards, "_TEMPLATE", "other")
    template = jinja2.DictLoader({"other": "{{ facts.no_such_fact }}"})
    monkeypatch.setattr(cards._environment(), "loader", template)
    with pytest.raises(jinja2.UndefinedError, match="no_such_fact"):
        render_card(stored(), license=None)


# --------------------------------------------------------------------------------------------------- hostile facts


@pytest.mark.parametrize(
    ("task_type", "fences"),
    [(HOSTILE, ["python", ""]), ("CAUSAL_LM", ["python", "", ""])],
    ids=["no command", "with its command"],
)
def test_hostile_names_stay_text(stored, task_type, fences):
    layers = tuple(f"{name}{HOSTILE}" for name in LAYERS)
    manifest = make_manifest(
        layers,
        base_model={"name_or_path": HOSTILE, "revision": HOSTILE, "config": {}, "weights_sha256": HOSTILE},
        versions={HOSTILE: HOSTILE},
        kept={HOSTILE: HOSTILE},
        created=HOSTILE,
    )
    text = "".join(c for c in HOSTILE if c.isprintable() or c == "\n")  # others are refused when a report is read
    one_line = text.replace("\n", " ")
    names = [f"{name}{text}" for name in LAYERS]
    report = make_report(names, notes=[text], loss_reduction=text, seconds={one_line: 1.0})
    adapter = {"task_type": task_type}
    if task_type == HOSTILE:
        adapter |= {"modules_to_save": [HOSTILE], "bias": HOSTILE, "trainable_token_indices": {one_line: [1]}}
    init = stored(manifest=manifest, report=report, adapter=adapter)
    card = render_card(init, license=None, datasets=[HOSTILE], hardware=HOSTILE, notes=[HOSTILE])
    metadata, body = split(card)
    assert set(metadata) - {"pipeline_tag"} == {"library_name", "tags", "lora_da"}
    tokens = list(PARSER.parse(body))
    children = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *children]}
    assert not kinds & {"html_block", "html_inline", "image"}
    links = [child.attrs["href"] for child in children if child.type == "link_open"]
    assert set(links) == {"https://arxiv.org/abs/2510.24561"}
    assert [token.content for after, token in itertools.pairwise(tokens) if after.type == "heading_open"] == [
        "LoRA-DA initialisation",
        *SECTIONS,
    ]
    assert [token.info for token in tokens if token.type == "fence"] == fences


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/model", None, "org/model"),
        ("./checkpoints/model", None, None),
        ("gpt2", "c" * 40, "gpt2"),
        ("gpt2", None, None),
        ("./outputs/model", None, None),
        ("/home/somebody/model", None, None),
        ("a b/c", "c" * 40, None),
    ],
)
def test_only_names_on_the_hub_become_the_base_model(stored, name, revision, expected):
    base = {"name_or_path": name, "revision": revision}
    metadata, _ = split(render_card(stored(manifest=make_manifest(base_model=base)), license=None))
    assert metadata.get("base_model") == expected


def test_a_local_copy_can_be_named(stored):
    init = stored(manifest=make_manifest(base_model={"name_or_path": "/home/somebody/copy"}))
    metadata, body = split(render_card(init, license=None, base_model="org/model"))
    assert metadata["base_model"] == "org/model"
    assert "from a local copy named `copy`" in body


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, "repo_id='a/b/c' is no name"),
        ({"commit": "main"}, "commit='main' is no commit"),
        ({"license": "Apache 2"}, "license='Apache 2' is no identifier"),
        ({"license": "other", "license_link": "javascript:alert(1)"}, "must be an https address"),
        ({"license": "mit", "license_name": "own"}, "are of a licence called other, and it is 'mit'"),
        ({"license_link": "LICENSE"}, "are of a licence called other, and it is None"),
        ({"language": ["English!"]}, "'English!' is no code"),
        ({"language": ["pt-BR"]}, "'pt-BR' is no code of a language that the Hub takes"),
        ({"commit": COMMIT}, "is one of a repository. Give its repo_id too"),
    ],
)
def test_malformed_arguments_are_refused(stored, arguments, message):
    with pytest.raises(CardError, match=re.escape(message)):
        render_card(stored(), **{"license": None, **arguments})


def test_a_malformed_base_model_is_refused(stored):
    with pytest.raises(ConfigError, match="no name of a model on the Hub"):
        render_card(stored(), license=None, base_model="a b")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {"q_proj": 3.5},
        },
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["classifier"],
            "lora_bias": True,
            "bias": "lora_only",
            "trainable_token_indices": {"embed_tokens": [3, 5]},
        },
    ],
)
def test_the_lines_of_use_make_the_stored_adapter(stored, tmp_path, settings):
    config = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings)
    layers = (*LAYERS, "model.layers.0.mlp.experts[0]", "model.layers.0.mlp.experts.base_layer[3]")
    config.save_pretrained(tmp_path)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    card = render_card(
        stored(manifest=make_manifest(layers), report=make_report(layers), adapter=adapter), license=None
    )
    call = card[card.index("LoraConfig(\n") : card.index("trainer = ")]
    made = eval(call, {"LoraConfig": LoraConfig})
    of_scaling = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    for name in (*of_scaling, "modules_to_save", "lora_bias", "bias", "trainable_token_indices"):
        assert getattr(made, name) == getattr(config, name)
    for name in ("target_modules", "target_parameters"):
        assert set(getattr(made, name) or ()) == set(settings.get(name, ()))


def test_a_classifiers_lines_of_use_have_its_labels_and_not_what_peft_trains_anyway(stored, tmp_path):
    save_file({"base_model.model.score.weight": torch.zeros(3, 8)}, tmp_path / "adapter_model.safetensors")
    adapter = {"lora_alpha": 16, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score", "pooler"]}
    card = render_card(stored(adapter=adapter), license=None)
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base-model", revision="' in card
    assert ", num_labels=3)\n" in card
    assert 'modules_to_save=["pooler"],' in card
    noted = {"base_model_class": "BertForSequenceClassification"}
    without_task = {"task_type": None, "auto_mapping": noted, "modules_to_save": ["score"]}
    card = render_card(stored(adapter=without_task), license=None)
    assert "model = BertForSequenceClassification.from_pretrained(" in card
    assert ", num_labels=3)\n" in card
    assert 'modules_to_save=["score"],' in card


def test_the_lines_of_use_freeze_a_where_it_was_frozen(stored):
    frozen = stored(manifest=make_manifest(config=LoRADAConfig(freeze_a=True).to_dict()))
    for init, is_frozen in ((frozen, True), (stored(), False)):
        card = render_card(init, license=None)
        assert ("da_config=LoRADAConfig(freeze_a=True)," in card) == is_frozen
        assert ("import LoRADAConfig, LoRADATrainer" in card) == is_frozen


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, "LlamaForCausalLM"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "Trainer"}}, "AutoModel"),
        ({"task_type": None, "auto_mapping": {"base_model_class": "OfSomebodyElse"}}, "AutoModel"),
    ],
)
def test_the_card_loads_the_base_by_the_class_of_the_task_or_of_the_adapter(stored, adapter, expected):
    text = render_card(stored(adapter={"lora_alpha": 16, **adapter}), license="mit")
    assert f"from transformers import {expected}\n" in text
    assert f"model = {expected}.from_pretrained(" in text
