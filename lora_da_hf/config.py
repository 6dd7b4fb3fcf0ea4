"""The settings of an initialisation, validated when they are made."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from lora_da_hf.errors import ConfigError, do_you_mean

_DAMPING = re.compile(r"([\d.]+(?:e[+-]?\d+)?) *(?:\* *(mean|median))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Damping:
    """What is added to a factor's diagonal: an absolute amount, or a multiple of the diagonal's mean or median."""

    amount: float
    reference: Literal["absolute", "mean", "median"] = "absolute"

    @classmethod
    def parse(cls, value: float | str) -> Damping:
        """Read ``1e-6``, ``"0.1*mean"`` or ``"0.1*median"``; anything else is a ValueError."""
        found = _DAMPING.fullmatch(str(value).strip())
        if found is None:
            raise ValueError('be a number from 0 up, or a multiple such as "0.1*mean" or "0.1*median"')
        return cls(amount=float(found[1]), reference=found[2] or "absolute")  # pyright: ignore[reportArgumentType]


def _memory(value: float | str) -> float | str:
    fits = re.fullmatch(r"\d+|\d+(\.\d+)? ?[KMG]i?B", value) if isinstance(value, str) else 1 <= value < math.inf
    if not fits:
        raise ValueError('be a number of bytes, or text such as "8GiB" or "500MB"')
    return value


Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DampingRule = Annotated[float | str, AfterValidator(lambda value: Damping.parse(value) and value)]
Start = Literal["lora_da", "gradient", "whitened_gradient", "inputs"]
STARTS = get_args(Start)
Settings = TypeVar("Settings")


def setting(default: Any, help_text: str) -> Any:
    """Make a dataclass field whose help text the command line shows."""
    return field(default=default, metadata={"help": help_text})


def in_words(cls: type[Settings]) -> type[Settings]:
    """Have a pydantic dataclass raise ConfigError, which says in one line which value to change and how."""
    validated = cls.__init__

    @functools.wraps(validated)
    def init(self: Any, *unnamed: Any, **settings: Any) -> None:
        try:
            validated(self, *unnamed, **settings)
        except ValidationError as error:
            raise ConfigError(_first_error(error, list(cls.__annotations__))) from None

    cls.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def _first_error(error: ValidationError, names: Sequence[str]) -> str:
    errors = error.errors(include_url=False)
    first = errors[0]
    place = first["loc"][:1]
    if first["type"] == "unexpected_keyword_argument":
        return f"{place[0]!r} is not a setting.{do_you_mean(str(place[0]), names)}"
    if first["type"] == "unexpected_positional_argument":
        return f"{first['input']!r} has no name. Settings are given by name, such as {names[0]}=256."
    texts = [re.sub("^(Value error, |Input should )", "", e["msg"]) for e in errors if e["loc"][:1] == place]
    asked = " or ".join(texts).replace("greater than or equal to", "at least").replace("or be ", "or ")
    return f"{place[0]}={first['input']!r} must {asked}." if place else asked


@in_words
@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class LoRADAConfig:
    """How LoRA adapters are initialised from data.

    ``LoRADAConfig()`` is this project's preset: damping relative to each factor, a line search over the step, and
    rows of A at the norm that PEFT's default initialisation gives them. A bad value is a ConfigError.
    """

    num_samples: Count = setting(256, "Samples for the statistics; all of them if you have fewer.")
    batch_size: Count | None = setting(
        None,
        "Samples in one forward and backward pass; the statistics do not depend on it, unless the loss is one of the "
        "batch (loss_reduction). None: the trainer's per-device training batch size, or 8 without a trainer.",
    )
    search_samples: Annotated[int, Field(ge=0)] = setting(
        16,
        "Samples for the line search, and as many held out to judge it by; four times as many if a sample has one "
        "label. Each is at most an eighth of the data.",
    )
    fit_heads: bool = setting(
        True,
        "Fit the heads that are trained beside the adapter (modules_to_save) before anything else, on four times "
        "num_samples other samples; with few others, on those of the statistics too.",
    )

    token_mask: Literal["attention", "labels"] = setting(
        "attention",
        "Tokens that the second moments count. attention: all attended ones; labels: those that predict a label.",
    )
    loss_reduction: Literal["auto", "token_mean", "sample_mean", "batch"] = setting(
        "auto",
        "How the loss of a batch is made of its samples. auto: measured; if it is neither a sum nor a mean, samples "
        "run one at a time. token_mean, sample_mean: a mean over labels, or over samples. batch: a loss of all samples "
        "together (contrastive); the statistics then depend on the batch size.",
    )

    start: Start = setting(
        "lora_da",
        "Where the adapter starts. gradient: the leading singular vectors of the gradient (LoRA-GA, LoRA-One); "
        "whitened_gradient: those of the gradient in units of both second moments; inputs: the leading principal "
        "components of the inputs with B zero (EVA).",
    )
    input_damping: DampingRule = setting(
        "0.1*mean",
        "Added to the diagonal of the input second moment: an absolute number, or a multiple of the diagonal's mean or "
        'median, such as "0.1*mean".',
    )
    output_damping: DampingRule = setting("0.1*mean", "The same for the output-gradient second moment.")
    variance_weight: Weight = setting(
        0.03, "Weight of the variance term, the noise of the estimate, beside the bias term."
    )
    normalize_guidance_terms: bool = setting(
        False, "Scale both terms of the guidance matrix to one Frobenius norm before weighting them."
    )

    layer_steps: Literal["displacement", "equal"] = setting(
        "displacement",
        "Relative size of the layers' updates. displacement: each layer's natural gradient step; equal: the same "
        "spectral norm for all (the paper, and always with start gradient).",
    )
    step_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["line_search"] | None = setting(
        "line_search",
        'Size of the initial update: "line_search", or the spectral norm of the largest layer\'s displacement. None: '
        "scaling / stable_gamma.",
    )
    stable_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = setting(
        1024.0, "The paper's way to set the step, scaling / stable_gamma. Used if step_size is None."
    )
    factor_split: Literal["default_norm", "orthonormal", "balanced"] = setting(
        "default_norm",
        "How the update is split into B and A. default_norm: rows of A have the norm of PEFT's default; orthonormal: "
        "the step is shared evenly (the paper); balanced: by the square roots of B's singular values.",
    )
    freeze_a: bool = setting(False, "Freeze A after the initialisation and train only B (LoRA-FA).")

    max_rank: Count | None = setting(
        None, "Rank that is solved and stored, for reuse at any smaller one. None: the largest rank of the adapter."
    )
    save_statistics: bool | Literal["leading"] = setting(
        False,
        "Store the statistics too (large), to solve again with other settings later. leading: the first max_rank "
        "directions of every start in their place, a few per cent of that. One process then solves alone.",
    )

    memory_budget: Annotated[float | str, AfterValidator(_memory)] | None = setting(
        None,
        "Memory for the statistics and the solve of a process on each device: bytes, or text such as 8GiB. Layers that "
        "do not fit are summed in host memory (one process on CUDA), or take further passes. None: two thirds of what "
        "is free.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LoRADAConfig:
        if self.searches_step and self.search_samples < 1:
            raise ValueError(
                'step_size="line_search" needs search_samples of at least 1: raise it, or give a step_size.'
            )
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> LoRADAConfig:
        """Make the authors' settings (arXiv 2510.24561), with any field overridden by keyword.

        The authors stay in train mode during the pass; here dropout is always off.
        """
        preset: dict[str, Any] = {"batch_size": 1, "fit_heads": False, "loss_reduction": "sample_mean"}
        preset |= {"input_damping": 1e-6, "output_damping": 1e-6}
        preset |= {"layer_steps": "equal", "step_size": None, "factor_split": "orthonormal"}
        return cls(**{**preset, **overrides})

    @property
    def searches_step(self) -> bool:
        """Whether the step is found by a line search."""
        return self.step_size == "line_search" and self.start != "inputs"

    @property
    def lengths(self) -> Literal["displacement", "equal"]:
        """How far layers go beside each other: starts without a natural gradient step go equally far."""
        return "equal" if self.start in ("gradient", "inputs") else self.layer_steps

    @property
    def keeps_a_without_step(self) -> bool:
        """Whether A is written where B stays zero: it is all that there is of the start then."""
        return self.freeze_a or self.start == "inputs"

    @classmethod
    def of(cls, given: LoRADAConfig | None) -> LoRADAConfig:
        """Return the settings that were given, or the preset; anything else is a ConfigError."""
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"The settings must be a LoRADAConfig(...), not a {type(given).__name__}.")
        return given or cls()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)


# ---- which settings may change later

SOLVE_SETTINGS = (
    "start",
    "input_damping",
    "output_damping",
    "variance_weight",
    "normalize_guidance_terms",
    "layer_steps",
    "max_rank",
)
"""Full statistics allow to change these."""

_WRITE_SETTINGS = ("step_size", "stable_gamma", "factor_split", "freeze_a")
"""The basis alone allows to change these."""

PASS_SETTINGS = ("memory_budget",)
"""How a machine makes a pass over data, which changes nothing that it finds."""

FREE_IN_REFIT = frozenset({*SOLVE_SETTINGS, *_WRITE_SETTINGS, "save_statistics"})

FREE_IN_USE = frozenset({*_WRITE_SETTINGS, "search_samples", "batch_size", "loss_reduction"})
"""What `apply_init` may change: the write, and the search of a step, which needs data and no statistics."""
