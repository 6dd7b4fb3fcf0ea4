"""The model that text is for, with its tokenizer and an adapter, and errors that name what to look at."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_da_hf.errors import ConfigError, TargetError
from lora_da_hf.pipeline.base_model import remember_commit
from lora_da_hf.training.arguments import ModelArguments

logger = logging.getLogger(__name__)


def load_model(name: str, arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer, and make sure that the tokenizer can pad."""
    shared = {"cache_dir": arguments.cache_dir, "trust_remote_code": arguments.trust_remote_code}
    revision = {"revision": arguments.model_revision}
    with naming_model(name):
        AutoConfig.from_pretrained(name, **revision, **shared)  # quick to fail
    with naming_model(arguments.tokenizer_name or name, "tokenizer", "Name one with --tokenizer_name."):
        of_model = {} if arguments.tokenizer_name else revision
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or name, **of_model, **shared)
    with naming_model(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, **revision, **shared)
    if tokenizer.eos_token is None:
        raise ConfigError("The tokenizer has no end-of-text token. Set its `eos_token` and save it again.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    remember_commit(model, revision=arguments.model_revision, cache_dir=arguments.cache_dir)
    embeddings: Any = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens but the model embeds only {embeddings}: "
            "use the tokenizer that belongs to the model."
        )
    return model, tokenizer


@contextlib.contextmanager
def naming_model(name: str, what: str = "model", advice: str = "Check the name and the connection.") -> Generator[None]:
    """Raise a ConfigError, when something cannot be loaded in the block, that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system
            raise
        raise ConfigError(f"The {what} {name} cannot be loaded: {one_sentence(error)} {advice}") from error


def with_adapter(model: Any, lora: LoraConfig) -> Any:
    """Wrap a model with an adapter."""
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        raise TargetError(f"--target_modules: {one_sentence(error)} Name layers of the model.") from error


def choose_block_size(wanted: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the block size: what was asked for, or 1024, but no more than the model can take."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if wanted is not None and wanted > limit:
        logger.warning("--block_size %d is more than the model takes; %d is used.", wanted, limit)
    return min(wanted or 1024, limit)


def one_sentence(error: BaseException) -> str:
    """Return what a library says of an error, the beginning of it as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 1 if isinstance(error, OSError) else 2]) or type(error).__name__
    return f"{text:.300}".rstrip(".,: ") + "."
