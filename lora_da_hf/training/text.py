"""Text as training data: the model and its tokenizer, rows from a file or a data set, and tokenised samples."""

from __future__ import annotations

import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_da_hf.errors import ConfigError, DataError
from lora_da_hf.pipeline.base_model import remember_commit
from lora_da_hf.statistics.token_masks import IGNORED_LABEL
from lora_da_hf.training.arguments import LOADERS, ModelArguments, TextArguments, loader_of

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset


def load_model(name: str, arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer, and make sure that the tokenizer can pad."""
    trust, revision = {"trust_remote_code": arguments.trust_remote_code}, {"revision": arguments.model_revision}
    AutoConfig.from_pretrained(name, **revision, **trust)  # fails sooner, and says what is missing
    of_model = {} if arguments.tokenizer_name else revision
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or name, **of_model, **trust)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, **revision, **trust)
    remember_commit(model, **revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    embeddings: Any = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens and the model embeds only {embeddings}: use the tokenizer that "
            "belongs to the model."
        )
    return model, tokenizer


def choose_block_size(wanted: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the block size: what was asked for, or 1024, but no more than the model can take."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if wanted is not None and wanted > limit:
        logger.warning("--block_size %d is more than the model takes; %d is used.", wanted, limit)
    return min(wanted or 1024, limit)


def load_file(path: str, *, split: str = "train", streaming: bool = False) -> Rows:
    """Load one csv, json, jsonl, parquet or txt file, which may be compressed."""
    loader = loader_of(path)
    if loader is None:
        raise DataError(
            f"{path} cannot be read as data: its name must end in {', '.join(LOADERS)}, or one of these and .gz."
        )
    options = {"keep_linebreaks": True} if loader == "text" else {}
    return _load(path, loader, data_files=path, split=split, streaming=streaming, **options)


def load_data_set(name: str, configuration: str | None, *, split: str | None = None, streaming: bool = False) -> Any:
    """Load a data set from the Hub or a folder, or one split of it."""
    source = str(Path(name).resolve()) if Path(name).is_dir() else name
    return _load(name, source, configuration, split=split, streaming=streaming)


def _load(name: str, *source: Any, **options: Any) -> Any:
    try:
        rows: Any = load_dataset(*source, **options)
        if options["split"]:
            next(iter(rows))  # StopIteration: there are none
    except (StopIteration, DatasetsError, ValueError, RuntimeError, OSError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{name} cannot be loaded as data, or holds no rows. {why:.300}") from error
    return rows


def tokenize(name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int, data: TextArguments) -> Rows:
    """Turn the rows of one split into samples with input ids, attention mask and labels."""
    columns = used_columns(name, rows, data)
    logger.info("The %s data: %s", name, " and ".join(columns))
    if data.has_pairs:
        encode = partial(_encode_pairs, tokenizer=tokenizer, columns=columns, block_size=block_size, data=data)
    else:
        encode = partial(_encode_text, tokenizer=tokenizer, column=columns[0], block_size=block_size)
    if isinstance(rows, IterableDataset):
        return rows.map(encode, batched=True, remove_columns=_column_names(rows))
    samples = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenising {name}")
    if len(samples) == 0:
        advice = "Raise it, so that prompts leave room" if data.has_pairs else "Lower it: 1,000 rows are joined"
        raise DataError(f"The {name} data gives no sample at --block_size {block_size}. {advice}.")
    if data.has_pairs and len(samples) < len(rows):
        logger.warning(
            "Left out: %d of %d %s rows, which have no completion, or none after cutting to %d tokens (--block_size).",
            *(len(rows) - len(samples), len(rows), name, block_size),
        )
    return samples


def used_columns(name: str, rows: Rows, data: TextArguments) -> list[str]:
    """Return the column that is read as plain text, or those of prompts and completions."""
    columns = _column_names(rows)
    wanted = [data.prompt_column, data.completion_column] if data.has_pairs else [data.text_column or "text"]
    if wanted == ["text"] and len(columns) == 1:
        return columns
    missing = [column for column in wanted if column not in columns]
    if missing:
        shown = ", ".join(map(repr, columns[:5])) + " and others" * (len(columns) > 5)
        raise DataError(
            f"The {name} data has no column {missing[0]!r}, only {shown}. Name pairs with --prompt_column and "
            "--completion_column, or plain text with --text_column."
        )
    return [column for column in wanted if column is not None]


def _column_names(rows: Rows) -> list[str]:
    """List the columns, which a stream may only show in its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def _texts(batch: dict[str, list[Any]], column: str) -> list[str]:
    """Return a column's texts; an empty cell is an empty text."""
    texts = ["" if value is None else value for value in batch[column]]
    other = next((value for value in texts if not isinstance(value, str)), None)
    if other is not None:
        raise DataError(
            f"Column {column!r} must hold text, not {other!r:.80}. Chats are for TRL's SFTTrainer, with LoRADACallback."
        )
    return texts


def _encode_text(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, block_size: int
) -> dict[str, list[list[int]]]:
    """Join the tokens of a batch of texts and cut them into blocks, without the incomplete last one."""
    texts = _texts(batch, column)
    tokens = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"] if texts else []))
    blocks = [tokens[end - block_size : end] for end in range(block_size, len(tokens) + 1, block_size)]
    return {
        "input_ids": blocks,
        "attention_mask": [[1] * block_size for _ in blocks],
        "labels": [list(block) for block in blocks],
    }


def _encode_pairs(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    block_size: int,
    data: TextArguments,
) -> dict[str, list[list[int]]]:
    """Encode prompts and completions, cut to the block size; leave out rows without a completion or without a label."""
    samples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    prompts, completions = (_texts(batch, column) for column in columns)
    for prompt, completion, given in zip(prompts, completions, batch[columns[1]], strict=True):
        if given is None:
            continue
        prompt_ids, completion_ids = _encode_pair(prompt, completion, tokenizer, in_chat=data.use_chat_template)
        if len(prompt_ids) < block_size:
            input_ids = (prompt_ids + completion_ids)[:block_size]
            samples["input_ids"].append(input_ids)
            samples["attention_mask"].append([1] * len(input_ids))
            samples["labels"].append(([IGNORED_LABEL] * len(prompt_ids) + completion_ids)[:block_size])
    return samples


def _encode_pair(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, in_chat: bool
) -> tuple[list[int], list[int]]:
    """Encode a pair as it stands, with an end-of-text token behind it, or as a user turn and its reply."""

    def ids(text: str, *, special: bool = False) -> list[int]:
        found: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return found

    if not in_chat:
        end: Any = tokenizer.eos_token_id
        return ids(prompt, special=True), [*ids(completion), end]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    before: Any = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(before):
        raise ConfigError(
            "--use_chat_template: this template writes a prompt differently once a reply follows, so the reply cannot "
            "be told apart. Leave the flag out."
        )
    return ids(before), ids(whole.removeprefix(before))
