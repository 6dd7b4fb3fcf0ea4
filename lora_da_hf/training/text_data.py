"""Text as training data: rows from a file or a data set, and tokenised samples."""

from __future__ import annotations

import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from pandas.errors import EmptyDataError
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from lora_da_hf.errors import ConfigError, DataError
from lora_da_hf.statistics.token_masks import IGNORED_LABEL
from lora_da_hf.training.arguments import LOADER_OF_SUFFIX, TextArguments, loader_of
from lora_da_hf.training.text_model import one_sentence

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset


def load_file(path: str, *, cache_dir: str | None, streaming: bool = False) -> Rows:
    """Load one csv, json, jsonl, parquet or txt file, which may be compressed.

    Raises:
        DataError: if it cannot be read as what its suffix says, or holds no rows.
    """
    loader = loader_of(path) or ""
    options: dict[str, Any] = {"keep_linebreaks": True} if loader == "text" else {}
    no_rows = f"{path} holds no rows. Give a file with samples."
    try:
        rows: Any = load_dataset(
            loader, data_files=path, split="train", cache_dir=cache_dir, streaming=streaming, **options
        )
        if streaming:
            next(iter(rows))
    except StopIteration as error:
        raise DataError(no_rows) from error
    except (DatasetsError, ValueError) as error:
        if _has_no_rows(error):
            raise DataError(no_rows) from error
        raise DataError(f"{path} cannot be read as {loader} data: {_reason(error)}") from error
    return rows


def load_data_set(
    name: str, configuration: str | None, *, cache_dir: str | None, split: str | None = None, streaming: bool = False
) -> Any:
    """Load a data set from the Hub or a folder, or one split of it.

    Raises:
        DataError: if it cannot be loaded, or holds no rows.
    """
    folder = Path(name)
    configs = [file for file in (CONFIG_NAME, "adapter_config.json") if (folder / file).is_file()]
    if configs and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):  # whose JSON would pass for data
        raise DataError(
            f"{name} holds a model and no data, as its {configs[0]} tells. Give the file or data set to train on."
        )
    try:
        return load_dataset(
            str(folder.resolve()) if folder.is_dir() else name,
            configuration,
            split=split,
            cache_dir=cache_dir,
            streaming=streaming,
        )
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if _has_no_rows(error):
            raise DataError(f"{name} holds no rows. Give a data set with samples.") from error
        if folder.is_dir():
            advice = f"Give a folder with data files of one kind, or one file ({', '.join(LOADER_OF_SUFFIX)})."
        else:
            advice = "Check the name and the connection; a private or gated data set needs `hf auth login`."
        raise DataError(f"{name} cannot be loaded as a data set: {_reason(error)} {advice}") from error


def _has_no_rows(error: Exception) -> bool:
    """Tell whether `datasets` failed for want of rows, which it says in several ways."""
    is_empty = any(isinstance(each, (SchemaInferenceError, EmptyDataError)) for each in (error, error.__cause__))
    return is_empty or "corresponds to no data" in str(error)


def _reason(error: Exception) -> str:
    """Return what `datasets` says of an error, or what the error behind it says."""
    if isinstance(error.__cause__, CastError):
        return "its files have different columns."
    return one_sentence(error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error)


def tokenize(name: str, split: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int, data: TextArguments) -> Rows:
    """Turn the rows of one split into samples with input ids, attention mask and labels."""
    columns = column_names(name, split)
    logger.info("%s", used_columns(name, columns, data))
    if data.has_pairs:
        encode_pair = pair_encoder(tokenizer, data)
        encode = partial(encode_pairs, encode_pair=encode_pair, block_size=block_size, data=data)
    else:
        column = text_column(name, columns, data)
        encode = partial(encode_text, tokenizer=tokenizer, column=column, block_size=block_size)
    if isinstance(split, IterableDataset):
        return split.map(encode, batched=True, remove_columns=columns)
    samples = split.map(
        encode,
        batched=True,
        remove_columns=columns,
        num_proc=data.preprocessing_num_workers,
        load_from_cache_file=not data.overwrite_cache,
        desc=f"Tokenising {name}",
    )
    if len(samples) == 0:
        advice = "there is less text in it, or in 1,000 of its rows, which are joined at a time, so lower it"
        if data.has_pairs:
            advice = "prompts leave no room, so raise it, or no row has a completion"
        raise DataError(f"The {name} data gives no sample at --block_size {block_size}: {advice}.")
    if data.has_pairs and len(samples) < len(split):
        logger.warning(
            "Left out: %d of %d %s rows, which have no completion, or none after cutting to %d tokens (--block_size).",
            *(len(split) - len(samples), len(split), name, block_size),
        )
    return samples


def column_names(name: str, split: Rows) -> list[str]:
    """List the columns of a split, which a stream may only show in its first row."""
    if split.column_names:
        return split.column_names
    first = next(iter(split), None)
    if first is None:
        raise DataError(f"The {name} data holds no rows. Give data with samples.")
    return list(first)


def text_column(name: str, columns: list[str], data: TextArguments) -> str:
    """Return the column that is read as plain text.

    Raises:
        DataError: if it is not there, or none was named and none is the only one or called `text`.
    """
    if data.text_column:
        require_columns(name, columns, data.text_column)
        return data.text_column
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise DataError(
            f"The {name} data has the columns {_few(columns)}, and none called 'text'. Say what to train on: pairs "
            "with --prompt_column and --completion_column, or plain text with --text_column."
        )
    return columns[0]


def used_columns(name: str, columns: list[str], data: TextArguments) -> str:
    """Say in one line which column of the rows is used as what.

    Raises:
        DataError: if one is not there.
    """
    if data.has_pairs:
        require_columns(name, columns, data.prompt_column, data.completion_column)
        return (
            f"The {name} data: column {data.prompt_column!r} is the prompt, {data.completion_column!r} the completion."
        )
    used = text_column(name, columns, data)
    unused = [column for column in columns if column != used]
    left_out = f" (left out: {_few(unused)})" if unused else ""
    return f"The {name} data: column {used!r} is read as plain text{left_out}."


def _few(columns: list[str]) -> str:
    """Name the first columns of what may be many."""
    return ", ".join(map(repr, columns[:5])) + " and others" * (len(columns) > 5)


def require_columns(name: str, columns: list[str], *wanted: str | None) -> None:
    """Check that columns exist."""
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise DataError(f"The {name} data has no column {missing[0]!r}, only {', '.join(columns)}.")


def strings(batch: dict[str, list[Any]], column: str) -> list[str]:
    """Return a column's texts; an empty cell is an empty text."""
    texts = ["" if value is None else value for value in batch[column]]
    for text in texts:
        if not isinstance(text, str):
            what = f"{type(text).__name__}: {text!r:.80}"
            chats = "; chats are read by TRL's SFTTrainer, with LoRADACallback" if isinstance(text, list) else ""
            raise DataError(f"Column {column!r} must hold text, not {what}. Write it as text there{chats}.")
    return texts


def encode_text(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, block_size: int
) -> dict[str, list[list[int]]]:
    """Join the tokens of a batch of texts and cut them into blocks, without the incomplete last one."""
    texts = strings(batch, column)
    tokens = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"] if texts else []))
    starts = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[start : start + block_size] for start in starts]
    return {
        "input_ids": blocks,
        "attention_mask": [[1] * block_size for _ in blocks],
        "labels": [list(block) for block in blocks],
    }


def encode_pairs(
    batch: dict[str, list[Any]], encode_pair: Any, block_size: int, data: TextArguments
) -> dict[str, list[list[int]]]:
    """Encode prompts and completions, cut to the block size, and leave out rows without completion or without a label.

    Args:
        batch: Columns of rows.
        encode_pair: Gives the token ids of one prompt and of its completion.
        block_size: Tokens that a sample may have.
        data: Names the columns.
    """
    samples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    completions = batch[data.completion_column or ""]
    texts = (strings(batch, column or "") for column in (data.prompt_column, data.completion_column))
    for prompt, completion, given in zip(*texts, completions, strict=True):
        prompt_ids, completion_ids = encode_pair(prompt, completion)
        if given is None or len(prompt_ids) >= block_size:
            continue
        input_ids = (prompt_ids + completion_ids)[:block_size]
        samples["input_ids"].append(input_ids)
        samples["attention_mask"].append([1] * len(input_ids))
        samples["labels"].append(([IGNORED_LABEL] * len(prompt_ids) + completion_ids)[:block_size])
    return samples


def pair_encoder(tokenizer: PreTrainedTokenizerBase, data: TextArguments) -> Any:
    """Choose how a prompt and its completion become token ids."""
    if not data.use_chat_template:
        return partial(encode_plain_pair, tokenizer=tokenizer)
    if tokenizer.chat_template is None:
        raise ConfigError("--use_chat_template: the tokenizer has no chat template. Leave the flag out.")
    return partial(encode_chat_pair, tokenizer=tokenizer)


def encode_plain_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Encode a pair as it stands, with an end-of-text token after the completion."""
    prompt_ids: Any = tokenizer(prompt, verbose=False)["input_ids"]
    completion_ids: Any = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return prompt_ids, [*completion_ids, end]


def encode_chat_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Encode a pair as a user turn and its reply."""
    question = [{"role": "user", "content": prompt}]
    before: Any = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    answer = [*question, {"role": "assistant", "content": completion}]
    whole: Any = tokenizer.apply_chat_template(answer, tokenize=False)
    if not whole.startswith(before):
        raise ConfigError(
            "--use_chat_template: this template writes a prompt differently once a reply follows, so the "
            "reply cannot be told apart. Leave the flag out."
        )
    prompt_ids: Any = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
    reply_ids: Any = tokenizer(whole[len(before) :], add_special_tokens=False, verbose=False)["input_ids"]
    return prompt_ids, reply_ids
