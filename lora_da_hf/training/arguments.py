"""Flags that scripts and the command line share, as dataclasses for `transformers.HfArgumentParser`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, get_args, get_origin, get_type_hints

from lora_da_hf.config import LoRADAConfig, setting
from lora_da_hf.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "da_"
ALL_LINEAR = "all-linear"
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def loader_of(path: str) -> str | None:
    """Return the loader of `datasets` for a file, which may be compressed, by its name; None: unknown."""
    return LOADERS.get(Path(path.lower().removesuffix(".gz")).suffix)


@dataclass
class ModelArguments:
    """How a model and its tokenizer are loaded."""

    tokenizer_name: str | None = setting(None, "Tokenizer, if it is not the model's own.")
    model_revision: str = setting("main", "Branch, tag or commit of the model on the Hub.")
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
    messages_column: str | None = setting(
        None,
        "Column with chats, lists of turns with a role and a content, which the tokenizer's chat template writes. The "
        "assistant's turns count in the loss. Descriptions of tools are not read.",
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often each of several sources is drawn from, until one is used up. None: all rows of all."
        },
    )

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.completion_column is None):
            missing = "--completion_column" if self.prompt_column else "--prompt_column"
            raise ConfigError(f"{missing} is missing: prompts and completions are only used together.")
        if sum(column is not None for column in (self.prompt_column, self.text_column, self.messages_column)) > 1:
            raise ConfigError("Give one of --text_column, --messages_column, or --prompt_column with its completions.")
        if self.use_chat_template and self.prompt_column is None:
            raise ConfigError("--use_chat_template needs --prompt_column and --completion_column.")
        if self.block_size is not None and self.block_size < 2:
            raise ConfigError(f"--block_size must be at least 2, got {self.block_size}.")

    @property
    def by_row(self) -> bool:
        """Whether each row is a sample, a chat or a prompt with its completion, and not plain text."""
        return self.prompt_column is not None or self.messages_column is not None


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
        """Make the configuration that PEFT reads."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=ALL_LINEAR if ALL_LINEAR in self.target_modules else self.target_modules,
        )


def with_adapter(model: Any, lora: "LoraConfig") -> Any:
    """Put an adapter on a model, or say what PEFT has against it: names of layers that are not there, for one."""
    from peft import get_peft_model

    try:
        made = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"PEFT cannot make this adapter: {error}") from error
    names = [name for name, _ in made.named_modules()]
    for target in sorted(lora.target_modules) if isinstance(lora.target_modules, set) else ():
        if not any(name.endswith(f".{target}") for name in names):  # PEFT asks for one of all
            raise ConfigError(f"--target_modules: the model has no layer {target}. Check the name, or leave it out.")
    return made


def _to_config(flags: Any) -> LoRADAConfig:
    names = [entry.name for entry in dataclasses.fields(LoRADAConfig)]
    return LoRADAConfig(**{name: setting_of_flag(name, getattr(flags, PREFIX + name)) for name in names})


def setting_of_flag(name: str, value: Any) -> Any:
    """Return the value of a setting from its flag's, which is text if the setting is a number or a word."""
    if isinstance(value, str) and bool in get_args(_HINTS[name]) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, str) or float not in get_args(_HINTS[name]):
        return value
    try:
        return None if value.lower() == "none" else float(value)
    except ValueError:
        return value


_HINTS = get_type_hints(LoRADAConfig)


def _flag_type(hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is Literal or not kinds:
        return hint
    return str if len(kinds) > 1 else Optional[kinds[0]]  # noqa: UP045 - the parser reads typing's form


def _flag(entry: Any) -> Any:
    may_be_bare = {"nargs": "?", "const": "true"} if bool in get_args(_HINTS[entry.name]) else {}
    return field(default=entry.default, metadata={"help": entry.metadata["help"], **may_be_bare})


LoRADAArguments: Any = dataclasses.make_dataclass(
    "LoRADAArguments",
    [(PREFIX + entry.name, _flag_type(_HINTS[entry.name]), _flag(entry)) for entry in dataclasses.fields(LoRADAConfig)],
    namespace={"to_config": _to_config, "__doc__": "The settings of LoRA-DA, each as a flag with the prefix da_."},
)
LoRADAArguments.__module__ = __name__
