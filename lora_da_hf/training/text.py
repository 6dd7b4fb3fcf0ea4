"""Text as training data: the model and its tokenizer, rows from a file or a data set, and tokenised samples."""

from __future__ import annotations

import glob
import json
import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
    model: Any = load_base(name, arguments, "AutoModelForCausalLM")
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


def load_base(name: str, arguments: ModelArguments, kind: str) -> PreTrainedModel:
    """Load a model with a class of transformers."""
    trust, revision = {"trust_remote_code": arguments.trust_remote_code}, arguments.model_revision
    model = getattr(transformers, kind).from_pretrained(name, dtype=arguments.dtype, revision=revision, **trust)
    remember_commit(model, revision=revision)
    return model


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
        raise DataError(f"{path} cannot be read as data: its name must end in {', '.join(LOADERS)}, or that and .gz.")
    as_it_stands = {"text": {"keep_linebreaks": True}, "csv": {"keep_default_na": False, "na_values": [""]}}
    options: Any = as_it_stands.get(loader, {})  # pandas would read words such as None and NA as empty cells
    options["data_files"] = glob.escape(path) if Path(path).is_file() else path
    return _load(path, loader, split=split, streaming=streaming, **options)


def load_data_set(name: str, configuration: str | None, *, split: str | None = None, streaming: bool = False) -> Any:
    """Load a data set from the Hub or a folder, or one split of it."""
    source = str(Path(name).resolve()) if Path(name).is_dir() else name
    return _load(name, source, configuration, split=split, streaming=streaming)


def mixed(sources: list[str], parts: list[Any], data: TextArguments, weights: list[float] | None) -> Rows:
    """Join rows of several sources: one after the other, or drawn by weights until one is used up.

    No row comes twice: held-out rows would be among the others. All have their texts in the same columns.
    """
    used = [used_columns(source, rows, data) for source, rows in zip(sources, parts, strict=True)]
    if any(columns != used[0] for columns in used):
        raise DataError(f"The sources' texts are in columns of several names, {used}. Rename them to one name.")
    if weights is not None and len(weights) != len(parts):
        raise ConfigError(f"--data_weights has {len(weights)} numbers for {len(parts)} sources. Give one for each.")
    parts = [rows.select_columns(used[0]) for rows in parts]
    if weights is None or len(parts) == 1:
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, shares, seed=0, stopping_strategy="first_exhausted")


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
    if (data.messages_column or data.use_chat_template) and tokenizer.chat_template is None:
        raise ConfigError(
            "The tokenizer has no chat template. Name one that has, such as that of the model's instruct version, with "
            "--tokenizer_name, or give pairs of text without --use_chat_template."
        )
    logger.info("The %s data: %s", name, " and ".join(columns))
    if data.by_row:
        encode = partial(_encode_rows, tokenizer=tokenizer, columns=columns, block_size=block_size, data=data)
    else:
        encode = partial(_encode_text, tokenizer=tokenizer, column=columns[0], block_size=block_size)
    if isinstance(rows, IterableDataset):
        return rows.map(encode, batched=True, remove_columns=_column_names(rows))
    samples = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenising {name}")
    if len(samples) == 0:
        advice = "Raise it, so that prompts leave room" if data.by_row else "Lower it: 1,000 rows are joined"
        raise DataError(f"The {name} data gives no sample at --block_size {block_size}. {advice}.")
    if data.by_row and len(samples) < len(rows):
        logger.warning(
            "Left out: %d of %d %s rows, which have no completion, or none after cutting to %d tokens (--block_size).",
            *(len(rows) - len(samples), len(rows), name, block_size),
        )
    cut = sum(len(ids) == block_size for ids in samples["input_ids"]) if data.by_row else 0
    if cut:
        logger.warning(
            "Cut: %d of %d %s rows fill %d tokens (--block_size), and what is beyond is left out.",
            *(cut, len(rows), name, block_size),
        )
    return samples


def used_columns(name: str, rows: Rows, data: TextArguments) -> list[str]:
    """Return the column of plain text or of chats, or those of prompts and completions."""
    columns = _column_names(rows)
    pair = [data.prompt_column, data.completion_column]
    wanted = pair if data.prompt_column else [data.messages_column or data.text_column or "text"]
    if wanted == ["text"] and len(columns) == 1:
        return columns
    missing = [column for column in wanted if column not in columns]
    if missing:
        shown = ", ".join(map(repr, columns[:5])) + " and others" * (len(columns) > 5)
        raise DataError(
            f"The {name} data has no column {missing[0]!r}, only {shown}. Name pairs with --prompt_column and "
            "--completion_column, chats with --messages_column, or plain text with --text_column."
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
        raise DataError(f"Column {column!r} must hold text, not {other!r:.80}. Name chats with --messages_column.")
    return texts


def _encode_text(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, block_size: int
) -> dict[str, list[list[int]]]:
    """Join the tokens of a batch of texts and cut them into blocks, without the incomplete last one."""
    texts = _texts(batch, column)
    tokens = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"] if texts else []))
    blocks = [tokens[end - block_size : end] for end in range(block_size, len(tokens) + 1, block_size)]
    masks, labels = [[1] * block_size for _ in blocks], [list(block) for block in blocks]
    return {"input_ids": blocks, "attention_mask": masks, "labels": labels}


def _encode_rows(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    block_size: int,
    data: TextArguments,
) -> dict[str, list[list[int]]]:
    """Encode pairs or chats, cut to the block size; leave out rows without a completion or without a label."""
    samples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    if data.messages_column:
        rows = [_of_chat(turns, tokenizer) for turns in batch[columns[0]]]
    else:
        prompts, completions = (_texts(batch, column) for column in columns)
        pairs = zip(prompts, completions, batch[columns[1]], strict=True)
        as_parts = _of_chat_pair if data.use_chat_template else _of_pair
        rows = [as_parts(prompt, completion, tokenizer) for prompt, completion, given in pairs if given is not None]
    for parts in rows:
        input_ids = [token for tokens, _ in parts for token in tokens][:block_size]
        labels = [token if counts else IGNORED_LABEL for tokens, counts in parts for token in tokens][:block_size]
        if any(label != IGNORED_LABEL for label in labels):
            samples["input_ids"].append(input_ids)
            samples["attention_mask"].append([1] * len(input_ids))
            samples["labels"].append(labels)
    return samples


_Parts = list[tuple[list[int], bool]]
"""Tokens one after the other, and whether they count in the loss."""


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    puts_an_end = special and tokenizer("a", verbose=False)["input_ids"][-1:] == [tokenizer.eos_token_id]
    return found[:-1] if puts_an_end else found  # more is to follow


def _in_parts(texts: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> _Parts:
    """Encode texts that follow each other, each behind those before it where that leaves their tokens as they are.

    Alone, SentencePiece begins each with a space that the text has not; behind the end of a line it does not.
    """
    parts: _Parts = []
    so_far, done, line_end = "", list[int](), _ids("\n", tokenizer, special=False)
    for text, counts in texts:
        so_far += text
        whole = _ids(so_far, tokenizer, special=special)
        before = done
        if whole[: len(done)] != done:
            whole, before = _ids("\n" + text, tokenizer, special=False), line_end
        own = whole[len(before) :] if whole[: len(before)] == before else _ids(text, tokenizer, special=False)
        parts.append((own, counts))
        done += own
    return parts


def _of_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """Encode a pair as it stands, with an end-of-text token behind it, unless it ends in one."""
    end: Any = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before, own = _in_parts([(prompt, False), (completion, True)], tokenizer, special=True)
    return [before, own, ([] if own[0][-1:] == end else end, True)]


def _of_chat_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    return _of_chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tokenizer)


def _of_chat(turns: Any, tokenizer: PreTrainedTokenizerBase) -> _Parts:
    """Encode a chat of any number of turns by the tokenizer's template; the assistant's turns count."""
    are_turns = isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    if not (are_turns and all(turn.get("tool_calls") or isinstance(turn.get("content"), str) for turn in turns)):
        raise DataError(f"A chat must be a list of turns with a role and a content that is text, not {turns!r:.80}.")
    # a table of structs, such as parquet's, has the arguments of every tool in each call
    turns = json.loads(json.dumps(turns), object_hook=lambda found: {k: v for k, v in found.items() if v is not None})
    texts: list[tuple[str, bool]] = []
    done = ""
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before: Any = tokenizer.apply_chat_template(turns[:place], tokenize=False, add_generation_prompt=True)
            whole: Any = tokenizer.apply_chat_template(turns[: place + 1], tokenize=False)
            if not (before.startswith(done) and whole.startswith(before)):
                raise ConfigError(
                    "The chat template writes turns differently once others follow, so the assistant's cannot be told "
                    "apart. Give prompts and completions without --use_chat_template, or another tokenizer."
                )
            texts += [(before[len(done) :], False), (whole[len(before) :], True)]
            done = whole
    return _in_parts(texts, tokenizer)
