"""Every setting of `LoRADAConfig` as a command-line flag, for `transformers.HfArgumentParser`."""

import dataclasses
from typing import Any, Literal, Optional, get_args, get_origin, get_type_hints

from lora_da_hf.config import LoRADAConfig

PREFIX = "da_"


class _ToConfig:
    """What the generated dataclass can do."""

    def to_config(self) -> LoRADAConfig:
        """Return the settings.

        Raises:
            ConfigError: if a value is out of range.
        """
        values = {}
        for setting in dataclasses.fields(LoRADAConfig):
            value = getattr(self, PREFIX + setting.name)
            values[setting.name] = _number_if_it_is_one(value) if _is_mixed(setting.name) else value
        return LoRADAConfig(**values)


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
            PREFIX + setting.name,
            _flag_type(setting.name),
            dataclasses.field(default=setting.default, metadata=dict(setting.metadata)),
        )
        for setting in dataclasses.fields(LoRADAConfig)
    ],
    bases=(_ToConfig,),
)
LoRADAArguments.__module__ = __name__
LoRADAArguments.__doc__ = "The settings of LoRA-DA, each as a flag with the prefix da_."
