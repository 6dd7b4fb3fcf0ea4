"""The settings of an initialisation, validated when they are made."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_da_hf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Damping:
    """A damping rule: an absolute amount, or a multiple of a statistic of the factor's diagonal.

    Attributes:
        amount: What is added to the diagonal, or the multiple of ``reference`` that is added.
        reference: ``"absolute"``, or the statistic of the diagonal (``"mean"`` or ``"median"``) to multiply.
    """

    amount: float
    reference: Literal["absolute", "mean", "median"] = "absolute"

    @classmethod
    def parse(cls, value: float | str, name: str) -> Damping:
        """Read ``1e-6``, ``"0.1*mean"`` or ``"0.1*median"``.

        Args:
            value: The setting as a user writes it.
            name: Name of the setting, for the message.

        Raises:
            ConfigError: if the text has another form, or the amount is negative or not finite.
        """
        amount, star, reference = str(value).partition("*")
        reference = reference.strip() if star else "absolute"
        try:
            number = float(amount)
        except ValueError:
            number = math.nan
        if reference not in ("absolute", "mean", "median") or (star and reference == "absolute"):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number) or number < 0:
            raise ConfigError(
                f"{name}={value!r} is not a damping. Give a number that is not negative (absolute damping), or a "
                f'multiple of the diagonal\'s mean or median such as "0.1*mean" or "0.1*median".'
            )
        return cls(amount=number, reference=reference)  # pyright: ignore[reportArgumentType]


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(value: float | str) -> int:
    """Read ``memory_budget``, a number of bytes: ``8589934592``, ``"8GiB"`` or ``"500 MB"``.

    Args:
        value: The setting as a user writes it.

    Raises:
        ConfigError: if the text has another form, or there is not at least one byte.
    """
    found = re.fullmatch(r"([0-9.e+]+)\s*([KMGT]?i?B?)", str(value).strip())
    try:
        size = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except (ValueError, KeyError):
        size = math.nan
    if isinstance(value, bool) or not math.isfinite(size) or size < 1:
        raise ConfigError(
            f'memory_budget={value!r} is no amount of memory. Give bytes, or text such as "8GiB" or "500MB".'
        )
    return int(size)


def setting(default: Any, help_text: str) -> Any:
    """Make a dataclass field whose help text the command line shows."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class LoRADAConfig:
    """How LoRA adapters are initialised from data.

    ``LoRADAConfig()`` is this project's preset: damping relative to each factor, a line search over the step, and
    rows of A at the norm that PEFT's default initialisation gives them. `LoRADAConfig.paper` is the preset of
    the authors of arXiv 2510.24561.

    Raises:
        ConfigError: if a value is out of range, has the wrong type, or contradicts another one.
    """

    num_samples: int = setting(256, "Samples that the statistics are taken from (fewer are used if there are fewer).")
    batch_size: int | None = setting(
        None,
        "Samples in one forward and backward pass. The statistics do not depend on it. "
        "None: the trainer's per-device training batch size, or 8 without a trainer.",
    )
    sample_selection: Literal["head", "random"] = setting(
        "random",
        "Which samples: the first ones, or a random choice that `seed` fixes. Streams are read from the head.",
    )
    search_samples: int = setting(
        16,
        "Samples that the line search measures the loss on, and as many again that nothing else sees, to report the "
        "loss before and after. At most an eighth of the data each, and one sample for the search in any case.",
    )
    population_size: int | None = setting(
        None,
        "Number of samples that training will draw from, which scales the variance term. "
        "None: the length of the training set; a stream that has none needs it.",
    )
    seed: int | None = setting(None, "Seed of every random choice. None: the trainer's seed, or 42 without a trainer.")

    token_mask: Literal["attention", "labels"] = setting(
        "attention",
        "Tokens that the two second moments count: all that are attended to, or only those that predict a label.",
    )
    loss_reduction: Literal["auto", "token_mean", "sample_mean", "batch"] = setting(
        "auto",
        "How the loss of a batch comes from its samples, and so what training minimises. auto: measured; a loss that "
        "is neither a sum nor a mean runs one sample at a time. token_mean, sample_mean: a mean over labels, or over "
        "samples. batch: a loss that needs the samples together (contrastive); the statistics depend on the size.",
    )
    accumulate_dtype: Literal["float32", "float64"] = setting("float32", "Precision that statistics are summed in.")

    metric: Literal["weights", "fisher"] = setting(
        "weights",
        "What the subspace keeps small. weights: the expected squared distance of the weights (the paper); fisher: the "
        "same in the Fisher norm, which is the expected loss above the target's.",
    )
    input_damping: float | str = setting(
        "0.1*mean",
        'Added to the diagonal of the input second moment: a number is absolute, "0.1*mean" or "0.1*median" a '
        "multiple of the diagonal's.",
    )
    output_damping: float | str = setting("0.1*mean", "The same for the output-gradient second moment.")
    bias_weight: float = setting(1.0, "Weight of the bias term: the displacement that the subspace leaves out.")
    variance_weight: float = setting(0.03, "Weight of the variance term: noise of the estimate in the subspace.")
    normalize_guidance_terms: bool = setting(
        False, "Bring both terms of the guidance matrix to one Frobenius norm before they are weighed."
    )

    layer_steps: Literal["displacement", "equal"] = setting(
        "displacement",
        "How far the layers go beside each other. displacement: each as far as its displacement over its tokens, the "
        "natural gradient step; equal: all by the same spectral norm (the paper).",
    )
    step_size: float | str | None = setting(
        "line_search",
        "How far step 0 goes: the spectral norm of the displacement of the layer that goes farthest, which the adapter "
        "keeps as much of as its rank can. A number, line_search, or None to follow `stable_gamma`.",
    )
    stable_gamma: float = setting(
        1024.0, "The paper's way to say the step: scaling / stable_gamma. Used only if step_size is None."
    )
    factor_split: Literal["default_norm", "orthonormal", "balanced"] = setting(
        "default_norm",
        "How B @ A is split. default_norm: rows of A at the norm of PEFT's default, the step in B; orthonormal: "
        "the step shared evenly (the paper); balanced: by the square roots of B's singular values.",
    )
    projected_rms: float | None = setting(
        None,
        "Root mean square of A x in every layer, over rows and tokens: A's rows get a norm for each layer, and B the "
        "inverse. None: the norm that `factor_split` says, the same in all layers.",
    )
    uncalled_layers: Literal["error", "keep"] = setting(
        "error",
        "What to do with layers that no sample goes through: fail, since compiled or fused code looks like that, or "
        "keep PEFT's initialisation for them and report it.",
    )
    freeze_a: bool = setting(
        False, "Freeze A after the initialisation, for as long as the adapter lives (LoRA-FA): only B is trained."
    )

    solver: Literal["auto", "eigh", "krylov"] = setting(
        "auto", "Eigensolver: exact, block Krylov with a residual check, or whichever is faster at that size."
    )
    solve_dtype: Literal["auto", "float64", "float32"] = setting(
        "auto",
        "Precision of the solve. auto: float64, and float32 checked in float64 for inputs wider than 8192.",
    )
    max_rank: int | None = setting(
        None,
        "Rank that is solved and stored, for reuse at any smaller one. None: the largest rank of the adapter, or twice "
        "that with a rank_budget.",
    )
    rank_budget: int | None = setting(
        None,
        "Parameters of all A and B together: each layer gets the rank that the eigenvalues of its guidance matrix are "
        "worth, up to max_rank, and keeps its scaling. None: the adapter's own ranks.",
    )
    save_statistics: bool = setting(
        False,
        "Store the full statistics too (large), for a later change of settings. One process then solves alone.",
    )

    memory_budget: float | str | None = setting(
        None,
        "What the sums of a process may take on each device, with the work on them: bytes, or text such as 8GiB. None: "
        "two thirds of what is free there. Layers that do not fit at once are collected in further passes.",
    )
    schedule: Literal["auto", "samples", "layers"] = setting(
        "auto",
        "What several processes share. samples: each runs its part of them for all layers, and sums are reduced; "
        "layers: each runs all samples for its own layers, and nothing is reduced. auto: samples, unless memory is so "
        "short that layers takes no more passes.",
    )
    statistics_save_steps: int | None = setting(
        None,
        "Write the sums to disk every this many batches, so that a killed run goes on from there. None: never.",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "num_samples",
            "batch_size",
            "population_size",
            "max_rank",
            "rank_budget",
            "statistics_save_steps",
        ):
            _check_range(self, name, lambda v: v >= 1, "at least 1")
        for name in ("search_samples", "bias_weight", "variance_weight"):
            _check_range(self, name, lambda v: v >= 0 and math.isfinite(v), "finite and not negative")
        _check_range(self, "seed", lambda v: 0 <= v < 2**32, "between 0 and 2**32")
        _check_range(self, "projected_rms", lambda v: v > 0 and math.isfinite(v), "positive")
        _check_range(self, "stable_gamma", lambda v: v > 0 and math.isfinite(v), "positive")
        Damping.parse(self.input_damping, "input_damping")
        Damping.parse(self.output_damping, "output_damping")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.save_statistics and self.schedule == "layers":
            raise ConfigError('save_statistics needs the sums in one process: set schedule="samples" or leave it out.')
        if isinstance(self.step_size, str):
            if self.step_size != "line_search":
                raise ConfigError(f'step_size={self.step_size!r}: give a positive number, "line_search" or None.')
        else:
            _check_range(self, "step_size", lambda v: v > 0 and math.isfinite(v), "positive")
        if self.searches_step and self.search_samples < 1:
            raise ConfigError(
                'step_size="line_search" needs search_samples of at least 1, got 0. Raise it, or give a step_size.'
            )
        if self.projected_rms is not None and self.factor_split != "default_norm":
            raise ConfigError(
                f"projected_rms={self.projected_rms!r} and factor_split={self.factor_split!r} both say how long "
                "the rows of A are. Leave one of them out."
            )
        if self.bias_weight == 0 and self.variance_weight == 0:
            raise ConfigError("bias_weight and variance_weight are both 0: nothing is left to minimise. Raise one.")

    @classmethod
    def paper(cls, **overrides: Any) -> LoRADAConfig:
        """Make the authors' settings (arXiv 2510.24561), with any field overridden by keyword.

        The authors stay in train mode during the pass; here dropout is always off.
        """
        preset: dict[str, Any] = {
            "num_samples": 256,
            "batch_size": 1,
            "loss_reduction": "sample_mean",
            "sample_selection": "head",
            "token_mask": "attention",
            "input_damping": 1e-6,
            "output_damping": 1e-6,
            "bias_weight": 1.0,
            "variance_weight": 0.03,
            "layer_steps": "equal",
            "step_size": None,
            "stable_gamma": 1024.0,
            "factor_split": "orthonormal",
        }
        return cls(**{**preset, **overrides})

    @property
    def searches_step(self) -> bool:
        """Whether the step is found by a line search."""
        return self.step_size == "line_search"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRADAConfig:
        """Make a config from plain JSON values.

        Raises:
            ConfigError: if a name is not a setting of this version.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"Unknown settings {unknown}. This version of lora_da_hf does not know them.")
        return cls(**values)


def checked_config(config: object) -> LoRADAConfig:
    """Return the settings; the default ones for None.

    Raises:
        ConfigError: if it is something else, such as a dict.
    """
    if config is None:
        return LoRADAConfig()
    if not isinstance(config, LoRADAConfig):
        raise ConfigError(f"The settings are a {type(config).__name__}. Give a LoRADAConfig.")
    return config


def _check_types(config: LoRADAConfig) -> None:
    hints = get_type_hints(type(config))
    for setting in dataclasses.fields(config):
        value, hint = getattr(config, setting.name), hints[setting.name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ConfigError(f"{setting.name}={value!r} is not one of {', '.join(map(repr, get_args(hint)))}.")
            continue
        allowed = get_args(hint) or (hint,)
        fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits:
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{setting.name}={value!r} must be {names}, not {type(value).__name__}.")


def _check_range(config: LoRADAConfig, name: str, holds: Any, requirement: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ConfigError(f"{name}={value!r} must be {requirement}.")
