"""Flags that scripts and the command line share, as dataclasses for `transformers.HfArgumentParser`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, get_args, get_origin, get_type_hints

from lora_da_hf.config import LoRADAConfig, setting
from lora_da_hf.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "da_"
ALL_LINEAR = "all-linear"
_PLAIN = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
LOADER_OF_SUFFIX = {**_PLAIN, ".parquet": "parquet", **{f"{suffix}.gz": loader for suffix, loader in _PLAIN.items()}}


def loader_of(path: str) -> str | None:
    """Return the loader of `datasets` for a file by the end of its name; None: there is none."""
    return next((loader for suffix, loader in LOADER_OF_SUFFIX.items() if path.lower().endswith(suffix)), None)


def check_data_file(path: str, fail: Callable[[str], Any]) -> None:
    """Check that a data file exists and is of a kind that can be read.

    Args:
        path: The file.
        fail: Called with a message that says what is wrong; does not return.
    """
    if Path(path).is_dir():
        fail(f"{path} is a folder: name a file in it")
    if loader_of(path) is None:
        fail(f"{path}: the name must end in one of {', '.join(LOADER_OF_SUFFIX)}")
    if not Path(path).is_file():
        fail(f"{path} does not exist")


@dataclass
class ModelArguments:
    """How a model and its tokenizer are loaded."""

    tokenizer_name: str | None = setting(None, "Tokenizer, if it is not the model's own.")
    model_revision: str = setting("main", "Branch, tag or commit of the model on the Hub.")
    cache_dir: str | None = setting(None, "Where models and datasets from the Hub are kept.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the frozen weights; auto: as stored. The adapter is float32 in any case."
    )
    trust_remote_code: bool = setting(False, "Run model code that comes with the checkpoint.")


@dataclass
class TextArguments:
    """How a row of data becomes a sample."""

    block_size: int | None = setting(
        None,
        "Tokens in a block of plain text, and the most tokens of a prompt with its completion. "
        "None: 1024, or the model's limit if that is lower.",
    )
    text_column: str | None = setting(None, "Column with plain text. None: `text`, or the only column.")
    prompt_column: str | None = setting(None, "Column with prompts, which do not count in the loss.")
    completion_column: str | None = setting(None, "Column with completions, which alone count in the loss.")
    use_chat_template: bool = setting(
        False, "Write prompt and completion as a user turn and its reply, with the tokenizer's chat template."
    )
    preprocessing_num_workers: int | None = setting(None, "Processes that tokenise the data.")
    overwrite_cache: bool = setting(False, "Tokenise again even if a cached result exists.")

    @property
    def has_pairs(self) -> bool:
        """Whether rows are prompt and completion instead of plain text."""
        return self.prompt_column is not None

    def check(self, fail: Callable[[str], Any]) -> None:
        """Find contradictions before anything is loaded.

        Args:
            fail: Called with a message that says what to change; does not return.
        """
        if (self.prompt_column is None) != (self.completion_column is None):
            missing = "--completion_column" if self.prompt_column else "--prompt_column"
            fail(f"{missing} is missing: prompts and completions are only used together")
        if self.has_pairs and self.text_column:
            fail("give either --text_column, or --prompt_column and --completion_column, not all three")
        if self.use_chat_template and not self.has_pairs:
            fail("--use_chat_template needs --prompt_column and --completion_column")
        for flag, least in (("block_size", 2), ("preprocessing_num_workers", 1)):
            value = getattr(self, flag)
            if value is not None and value < least:
                fail(f"--{flag} must be at least {least}, got {value}")


@dataclass
class LoraArguments:
    """The LoRA adapter."""

    lora_rank: int = setting(8, "Rank of the adapter.")
    lora_alpha: int = setting(16, "The adapter's output is multiplied by alpha / rank.")
    use_rslora: bool = setting(False, "Multiply by alpha / sqrt(rank) instead.")
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input during training.")
    target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "Names of the layers that get an adapter; all-linear: all but the output head."},
    )

    def to_peft(self) -> "LoraConfig":
        """Make the configuration that PEFT reads.

        Raises:
            ConfigError: if a value is out of range, or all-linear is not the only target.
        """
        for flag in ("lora_rank", "lora_alpha"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, flag)}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout:g}.")
        names = self.target_modules
        if ALL_LINEAR in names and names != [ALL_LINEAR]:
            raise ConfigError(
                f"--target_modules {' '.join(names)}: {ALL_LINEAR} stands for all linear layers but the output head "
                "and is given alone. Leave it or the other names out."
            )

        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        )


class _ToConfig:
    """What the generated dataclass can do."""

    def to_config(self) -> LoRADAConfig:
        """Return the settings.

        Raises:
            ConfigError: if a value is out of range.
        """
        values = {}
        for entry in dataclasses.fields(LoRADAConfig):
            values[entry.name] = setting_of_flag(PREFIX + entry.name, getattr(self, PREFIX + entry.name))
        return LoRADAConfig(**values)


def setting_of_flag(flag: str, value: Any) -> Any:
    """Return the value of a setting from its flag's, which is text if the setting is a number or a word."""
    return _number_if_it_is_one(value) if _is_mixed(flag.removeprefix(PREFIX)) else value


def _hint(name: str) -> Any:
    return get_type_hints(LoRADAConfig)[name]


def _is_mixed(name: str) -> bool:
    """Tell whether a setting is a number or a word, which the parser reads as text."""
    return {float, str} <= set(get_args(_hint(name)))


def _number_if_it_is_one(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        return value


def _flag_type(name: str) -> Any:
    hint = _hint(name)
    if get_origin(hint) is Literal:
        return hint
    if _is_mixed(name):
        return str
    allowed = [kind for kind in get_args(hint) if kind is not type(None)]
    return Optional[allowed[0]] if allowed else hint  # noqa: UP045 - the parser reads typing's form


LoRADAArguments: Any = dataclasses.make_dataclass(
    "LoRADAArguments",
    [
        (
            PREFIX + entry.name,
            _flag_type(entry.name),
            field(default=entry.default, metadata=dict(entry.metadata)),
        )
        for entry in dataclasses.fields(LoRADAConfig)
    ],
    bases=(_ToConfig,),
)
LoRADAArguments.__module__ = __name__
LoRADAArguments.__doc__ = "The settings of LoRA-DA, each as a flag with the prefix da_."
