"""The card of an initialisation: Markdown for people, metadata for the Hub, and the plot beside it.

Whatever a manifest says stays text on it, and cannot become markup, metadata or code.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import ModelCardData

from lora_da_hf.artifacts.folders import CARD_FILE, PLOT_FILE, TAGS, CardFacts
from lora_da_hf.artifacts.manifest import BaseModelFacts
from lora_da_hf.artifacts.store import StoredInit, is_repo_id
from lora_da_hf.errors import ConfigError
from lora_da_hf.report import LayerReport, LoRADAReport, kind_of, span

logger = logging.getLogger(__name__)

_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
MAX_LENGTH = 300
"""Of a text from outside on a card."""
_MARKUP = re.compile(r"([\\`*_\[\]~|$@#!]|:(?=/))")
_BLOCK_START = re.compile(r"^(?=[-+=>.)])")
_LIST_NUMBER = re.compile(r"^(\d+)(?=[.)](?: |$))")
_WWW = re.compile(r"(?i)(?<=www)\.")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def render_card(
    init: StoredInit,
    *,
    repo_id: str | None = None,
    base_license: str | None = None,
    plot: str | None = None,
    **facts: Any,
) -> str:
    """Render the card of a stored initialisation. Every text on it is escaped.

    Args:
        init: The initialisation.
        repo_id: Where it is published, if it is.
        base_license: The base model's licence, as the Hub has it.
        plot: Name of the plot that lies beside the card.
        facts: See `CardFacts`.

    Raises:
        ConfigError: if the Hub does not allow the name of the base model.
    """
    said: dict[str, Any] = {**vars(CardFacts(**facts)), "repo_id": repo_id, "base_license": base_license, "plot": plot}
    manifest, report, adapter = init.manifest, init.report, init.peft_config
    base, base_id = manifest.base_model, base_id_of(manifest.base_model, said["base_model"])
    task = adapter.get("task_type")
    ranks = {"rank": max(layer.rank for layer in report.layers), "max_rank": manifest.largest_rank}
    body = _template().render(
        **{**said, "manifest": manifest, "report": report, "adapter": adapter, "base_id": base_id},
        folder=init.folder.resolve().name,
        base_name=Path(base.name_or_path).name if base.name_or_path and base_id != base.name_or_path else None,
        kinds=list(Counter(kind_of(layer.name) for layer in report.layers).items()),
        auto_class=base_class_name(task),
    )
    metadata = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        library_name="peft",
        **{name: said[name] for name in ("license", "license_name", "license_link")},
        datasets=[name for name in said["datasets"] or () if is_repo_id(name)] or None,
        language=list(said["language"] or ()) or None,
        pipeline_tag=_TASKS.get(task or "", (None,))[0],
        tags=[*TAGS, *([f"base_model:adapter:{base_id}"] if base_id else [])],
        lora_da={"schema_version": manifest.schema_version, **ranks, "n_samples": report.num_samples},
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def render_page(init: StoredInit, **facts: Any) -> dict[str, bytes]:
    """Return the card, with ``facts`` as for `render_card`, and its plot by file name: none without matplotlib."""
    try:
        plots = {PLOT_FILE: draw_spectra(init.report)}
    except ImportError as error:
        logger.warning("The card has no plot (%s). It needs matplotlib.", error)
        plots = {}
    return {CARD_FILE: render_card(init, plot=next(iter(plots), None), **facts).encode("utf-8"), **plots}


def draw_spectra(report: LoRADAReport) -> bytes:
    """Draw the spectra of the guidance matrices as a PNG.

    Left, for each module type, the gain ``-eigenvalue`` of each stored direction, relative to the layer's first: the
    median over the layers, and their middle half. Right, for each layer, how many directions matter.
    """
    from matplotlib.figure import Figure  # which is optional

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.layers:
        groups[kind_of(layer.name)].append(layer)
    for number, (label, layers) in enumerate(groups.items()):
        gains = [[-value / (abs(layer.eigenvalues[0]) or 1.0) for value in layer.eigenvalues] for layer in layers]
        columns = np.array(list(itertools.zip_longest(*gains, fillvalue=np.nan)))
        low, middle, high = np.nanquantile(columns, [0.25, 0.5, 0.75], axis=1)
        left.plot(range(1, len(columns) + 1), middle, color=f"C{number}", label=label, marker=".")
        left.fill_between(range(1, len(columns) + 1), low, high, color=f"C{number}", alpha=0.12, lw=0)
        numbers = [re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", layer.name) for layer in layers]  # of the blocks
        depths = [int(found[1]) if found else 0 for found in numbers]
        right.plot(depths, [directions_that_matter(layer) for layer in layers], color=f"C{number}", marker=".", lw=1)
    left.axhline(0, color="black", lw=0.8)
    left.set(title="Guidance spectra by module type", xlabel="direction", ylabel="gain relative to the first direction")
    right.set(title="Directions that matter, by layer", xlabel="layer", ylabel="sum of gains / largest gain")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(groups), 8), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def directions_that_matter(layer: LayerReport) -> float:
    """Return the sum of a layer's positive gains over the largest; 0 if no direction gains."""
    gains = [-value for value in layer.eigenvalues if value < 0]
    return sum(gains) / max(gains) if gains else 0.0


def base_id_of(base: BaseModelFacts, given: str | None = None) -> str | None:
    """Return the name on the Hub of a base model, or the one given for a local copy; None for other folders.

    A recorded name has a commit or one slash; a folder's begins with ``./`` where it looks alike.
    """
    if given and not is_repo_id(given):
        raise ConfigError(f"base_model={given!r} must be a name on the Hub, such as user/name.")
    name = base.name_or_path
    is_on_hub = name and is_repo_id(name) and (base.revision or ("/" in name and not Path(name).is_dir()))
    return given or (name if is_on_hub else None)


def base_class_name(task_type: str | None) -> str:
    """Return the class of transformers that loads a base for PEFT's task type."""
    return _TASKS.get(task_type or "", (None, "AutoModel"))[1]


class Markdown(str):
    """Text that is Markdown already and is printed as it stands."""

    __slots__ = ()


def clean(value: Any) -> str:
    """Return text on one line, without control, format and surrogate characters, and of a bounded length."""
    text = "".join(" " if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 1]}…"


def escape(value: Any) -> Markdown:
    """Return a value as Markdown that shows just this text, in a paragraph or a table."""
    if isinstance(value, Markdown):
        return value
    text = _MARKUP.sub(r"\\\1", clean(value)).translate(_ENTITIES)
    return Markdown(_LIST_NUMBER.sub(r"\1\\", _BLOCK_START.sub(r"\\", _WWW.sub(r"\\.", text))))


def code(value: Any) -> Markdown:
    """Return a value as inline code. The two characters that could end it or a table's cell are replaced."""
    text = clean(value).replace("`", "'").replace("|", "¦")
    return Markdown(f"`{text}`" if text else "*(empty)*")


@functools.cache
def _template() -> jinja2.Template:
    package = Path(__file__).parents[1]
    environment = jinja2.Environment(  # the template lies in an installed package, and beside that of a checkout
        loader=jinja2.FileSystemLoader([package / "hub_cards", package.parent / "hub_cards"]),
        undefined=jinja2.StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "code": code,
        "python": lambda value: Markdown(repr(value)),
        "verbatim": Markdown,
        "number": lambda value, form: Markdown(format(value, form)),
        "change": lambda new, old: Markdown(f"{100 * (new - old) / abs(old):+.1f} %" if old else "no change"),
        "span": lambda values, form="d": Markdown(span(values, form, " to ")),
        "directions_that_matter": directions_that_matter,
    }
    environment.filters.update(filters)  # pyright: ignore[reportCallIssue, reportArgumentType] - jinja2 names its own
    return environment.get_template("init_card.md.jinja")
