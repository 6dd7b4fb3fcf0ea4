"""The card of an initialisation: Markdown for people, metadata for the Hub."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import logging
import math
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import transformers
import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_da_hf.artifacts.card_files import PLOTS, SEARCH_PLOT, SPECTRA_PLOT, TAGS
from lora_da_hf.artifacts.fingerprint import is_repo_id
from lora_da_hf.artifacts.store import StoredInit
from lora_da_hf.config import LoRADAConfig
from lora_da_hf.errors import CardError, MissingDependencyError
from lora_da_hf.hub.facts import CardFacts, card_facts
from lora_da_hf.hub.markdown import Markdown, clean, code, escape, python_literal
from lora_da_hf.hub.plots import directions_that_matter, draw_plots

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

logger = logging.getLogger(__name__)

_FLAG_PREFIX = "da_"
_WITH_FLAGS = {"use_rslora", "target_modules"}
"""Arguments of LoraConfig that `lora-da init` has flags for, beside rank, alpha and dropout."""

_TEMPLATE = "init_card.md.jinja"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LICENSE_LINK = re.compile(r"https://[!-~]+|[A-Za-z0-9_.-]+")
_CAUSAL_LMS = {"AutoModelForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


def render_card(
    init: StoredInit,
    *,
    license: str | None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_license: str | None = None,
    repo_id: str | None = None,
    commit: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    hardware: str | None = None,
    notes: Sequence[str] = (),
    plots: Collection[str] = (),
) -> str:
    """Render the card of a stored initialisation.

    Nothing of the samples is on it but their number, that of their tokens and a fingerprint. Every text from the
    manifest and the report is escaped.

    Args:
        init: The initialisation.
        license: The initialisation's licence, by the Hub's name for it; None: the card says that there is none.
        license_name: Its name, if ``license`` is ``"other"``.
        license_link: Where its text is, if ``license`` is ``"other"``.
        base_license: The base model's licence as the Hub has it; None: the card says that it is not known.
        repo_id: Where it is published; None: it is not.
        commit: The commit there that the card's lines of use name.
        base_model: Name of the base on the Hub, if it was computed from a local copy.
        datasets: What the samples are from: names of data sets on the Hub, or a few words.
        language: Codes of the samples' languages, such as ``"en"``.
        hardware: What it was computed on.
        notes: Sentences for the section on limits.
        plots: Names of the plots that lie beside the card, as `card_plots` has them; others are not shown.

    Raises:
        CardError: if an argument is malformed.
        ArtifactError: if PEFT's configuration in the folder is malformed.
    """
    _check(
        license=license,
        license_name=license_name,
        license_link=license_link,
        repo_id=repo_id,
        commit=commit,
        language=language,
    )
    facts = card_facts(init, base_model=base_model)
    metadata = card_metadata(
        facts,
        license=license,
        license_name=license_name,
        license_link=license_link,
        datasets=datasets,
        language=language,
    )
    body = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            facts=facts,
            report=facts.report,
            license=license,
            license_name=license_name,
            license_link=license_link,
            base_license=base_license,
            repo_id=repo_id,
            commit=commit,
            datasets=list(datasets),
            language=list(language),
            hardware=hardware,
            notes=list(notes),
            plots=[plot for plot in PLOTS if plot in plots],
            spectra_plot=SPECTRA_PLOT,
            search_plot=SEARCH_PLOT,
            auto_class=base_class_name(facts.task_type, facts.base_class),
            command=_command(facts),
            lora_arguments=_lora_arguments(facts),
        )
    )
    return f"---\n{_to_yaml(metadata)}---\n\n{body}"


def card_plots(init: StoredInit) -> dict[str, bytes]:
    """Draw the plots that go beside a card.

    Returns:
        By file name: a PNG for each thing that the report has something of. Without matplotlib there are none, which is
        logged.
    """
    try:
        return draw_plots(init.report)
    except MissingDependencyError as error:
        logger.warning("The card has no plots. %s", error)
        return {}


def base_class_name(task_type: str | None, noted: str | None) -> str:
    """Return the name of the class of transformers that loads the base model of an adapter.

    Args:
        task_type: PEFT's task type.
        noted: The class that PEFT noted, which counts where there is no task type.
    """
    found = getattr(transformers, noted, None) if noted and not task_type else None
    if noted and isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return noted
    return _TASKS.get(task_type or "", (None, "AutoModel"))[1]


def is_license(text: str) -> bool:
    """Tell whether a text is formed like the Hub's identifiers of licences."""
    return _LICENSE.fullmatch(text) is not None


def is_license_link(text: str) -> bool:
    """Tell whether a text can say where a licence is: an https address, or the name of a file beside the card."""
    return _LICENSE_LINK.fullmatch(text) is not None


def card_metadata(
    facts: CardFacts,
    *,
    license: str | None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the metadata that the Hub reads. A key whose value is not known is left out."""
    pipeline_tag = _TASKS.get(facts.task_type or "", (None, ""))[0]
    values = {
        "base_model": facts.base_id,
        "base_model_relation": "adapter" if facts.base_id else None,
        "library_name": "peft",
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "datasets": [name for name in datasets if is_repo_id(name)],
        "language": list(language),
        "pipeline_tag": pipeline_tag,
        "tags": [*TAGS, *([f"base_model:adapter:{facts.base_id}"] if facts.base_id else [])],
        "lora_da": _known(
            {
                "schema_version": facts.schema_version,
                "kind": facts.kind,
                "rank": facts.ranks[-1],
                "max_rank": facts.largest_rank,
                "alpha": facts.alpha,
                "target_modules": list(map(clean, facts.lora_arguments.get("target_modules", ()))),
                "target_parameters": list(map(clean, facts.lora_arguments.get("target_parameters", ()))),
                "base_revision": facts.base_revision,
                "base_fingerprint": facts.base_fingerprint,
                "n_samples": facts.num_samples,
                "n_tokens": facts.num_tokens,
                "seed": facts.seed,
                "files": {name: entry.sha256 for name, entry in sorted(facts.files.items())},
            }
        ),
    }
    return _known(values)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != []}


def _to_yaml(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=math.inf)


def _check(
    *,
    license: str | None,
    license_name: str | None,
    license_link: str | None,
    repo_id: str | None,
    commit: str | None,
    language: Sequence[str],
) -> None:
    if repo_id is not None and not is_repo_id(repo_id):
        raise CardError(f"repo_id={repo_id!r} is no name of a repository on the Hub. Give one such as user/name.")
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise CardError(f"commit={commit!r} is no commit. Give all 40 digits, as `lora-da pull` prints them.")
    if commit is not None and repo_id is None:
        raise CardError(f"commit={commit!r} is one of a repository. Give its repo_id too, or leave the commit out.")
    if license is not None and not is_license(license):
        raise CardError(f"license={license!r} is no identifier of a licence. Give the Hub's, such as apache-2.0.")
    if license != "other" and (license_name or license_link):
        raise CardError(f"license_name and license_link are of a licence called other, and it is {license!r}.")
    if license_link is not None and not is_license_link(license_link):
        raise CardError(f"license_link={license_link!r} must be an https address or the name of a file beside it.")
    wrong = [tag for tag in language if not _LANGUAGE.fullmatch(tag)]
    if wrong:
        raise CardError(
            f"language {wrong[0]!r} is no code of a language that the Hub takes. Give one of two or three letters, as "
            "en, without a region or script."
        )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (_template_folder() / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "code": code,
        "text": escape,
        "python": python_literal,
        "fixed": lambda value: Markdown(f"{value:.4f}"),
        "short": lambda value: Markdown(f"{value:.4g}"),
        "count": lambda value: Markdown(f"{value:,}"),
        "bytes": lambda value: Markdown(human_size(value)),
        "seconds": lambda value: Markdown(f"{value:.1f} s"),
        "change": _change,
        "span": _span,
        "commas": lambda values: Markdown(_joined(escape, values)),
        "model_link": lambda name: Markdown(f"[`{name}`](https://huggingface.co/{name})"),
        "directions_that_matter": directions_that_matter,
        "verbatim": Markdown,
    }
    environment.filters.update(filters)  # pyright: ignore[reportCallIssue, reportArgumentType] - jinja2 names its own
    return environment


def _template_folder() -> Traversable:
    """Return the folder of the templates: inside the installed package, or beside it in a checkout."""
    package = importlib.resources.files("lora_da_hf")
    inside = package / "hub_cards"
    return inside if inside.is_dir() else Path(str(package)).parent / "hub_cards"


def _joined(form: Callable[[Any], str], values: Sequence[Any]) -> str:
    return ", ".join(form(value) for value in values)


def _change(after: float, before: float) -> Markdown:
    return Markdown(f"{100 * (after - before) / abs(before):+.1f} %" if before else "no change")


def _span(values: Sequence[float], form: str = "d") -> Markdown:
    low, high = format(min(values), form), format(max(values), form)
    return Markdown(low if low == high else f"{low} to {high}")


def human_size(size: int) -> str:
    """Return a number of bytes for people, in multiples of 1024."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _lora_arguments(facts: CardFacts) -> dict[str, Any]:
    """Return what the example on the card gives to `LoraConfig`, beside rank and alpha."""
    task = {"task_type": facts.task_type} if facts.task_type in _TASKS else {}
    return {**facts.lora_arguments, **task}


def _command(facts: CardFacts) -> Markdown | None:
    """Return the command line with these settings, or None if it has no flags for the adapter."""
    base_class = base_class_name(facts.task_type, facts.base_class)
    has_flags = set(facts.lora_arguments) <= _WITH_FLAGS and float(facts.alpha).is_integer()
    if base_class not in _CAUSAL_LMS or not has_flags:
        return None
    words = ["lora-da", "init", facts.base_id or "BASE_MODEL", "DATA", "OUTPUT", "--lora_rank", str(facts.ranks[-1])]
    if facts.base_id and facts.base_revision:
        words += ["--model_revision", facts.base_revision]
    words += ["--lora_alpha", f"{facts.alpha:.0f}"]
    words += ["--lora_dropout", f"{facts.dropout:g}"] if facts.dropout else []
    words += ["--use_rslora"] if facts.uses_rslora else []
    words += ["--target_modules", *map(clean, facts.lora_arguments["target_modules"])]
    words += [f"--{_FLAG_PREFIX}seed", str(facts.seed)]
    for setting in dataclasses.fields(LoRADAConfig):
        value = getattr(facts.config, setting.name)
        if value != setting.default and setting.name != "seed":
            words += [f"--{_FLAG_PREFIX}{setting.name}", str(value)]
    return Markdown(" ".join(map(shlex.quote, words)).replace("`", "'"))
