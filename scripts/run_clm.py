"""Fine-tune a causal language model with LoRA, with or without the LoRA-DA initialisation.

Data comes from the Hugging Face Hub (`--dataset_name`) or a csv, json, jsonl, parquet or txt file (`--train_file`).
Plain text is tokenised, joined and cut into blocks. With `--prompt_column` and `--completion_column` each row
is one sample, and only the completion counts in the loss.

Examples:
    python scripts/run_clm.py --model_name_or_path MODEL --train_file notes.txt --do_train --output_dir out
    python scripts/run_clm.py --model_name_or_path MODEL --train_file train.jsonl --prompt_column question \
        --completion_column answer --init lora --do_train --do_eval --output_dir out
    python scripts/run_clm.py settings.yaml --learning_rate 1e-4
    torchrun --nproc_per_node 2 scripts/run_clm.py settings.yaml
    torchrun --nproc_per_node 2 scripts/run_clm.py settings.yaml --bf16 --deepspeed scripts/deepspeed/zero3.json
"""

import argparse
import json
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
import yaml
from datasets import IterableDataset
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from lora_da_hf import LoRADAError, LoRADATrainer
from lora_da_hf.adapters.write import freeze_a
from lora_da_hf.artifacts.folders import check_writable
from lora_da_hf.cli.verbs import explain
from lora_da_hf.config import setting
from lora_da_hf.errors import ConfigError, DataError, do_you_mean
from lora_da_hf.training.arguments import (
    LoraArguments,
    LoRADAArguments,
    ModelArguments,
    TextArguments,
    with_adapter,
)
from lora_da_hf.training.text import (
    Rows,
    choose_block_size,
    load_data_set,
    load_file,
    load_model,
    mixed,
    tokenize,
)

logger = logging.getLogger("run_clm")

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
SPLIT_SEED = 0
SHUFFLE_BUFFER = 10_000
LOSSES = {"loss": "training", "eval_loss": "validation"}


@dataclass
class NamedModelArguments(ModelArguments):
    """Which model and tokenizer are loaded, and how."""

    model_name_or_path: str | None = setting(None, "Model on the Hub, or a local folder.")


@dataclass
class DataArguments(TextArguments):
    """Where the data comes from and how a row becomes a sample."""

    dataset_name: str | None = setting(None, "Dataset on the Hub, or a local dataset folder.")
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Training data: csv, json, jsonl, parquet or txt files."}
    )
    validation_file: str | None = setting(None, "Validation data: a csv, json, jsonl, parquet or txt file.")
    validation_split_percentage: int = setting(
        5, "Percentage of the training rows that --do_eval holds out without validation data."
    )
    max_train_samples: int | None = setting(None, "Use this many training samples at most.")
    max_eval_samples: int | None = setting(None, "Use this many validation samples at most.")
    streaming: bool = setting(False, "Read the data while training instead of preparing it first.")


@dataclass
class AdapterArguments(LoraArguments):
    """The LoRA adapter and how it starts."""

    init: Literal["lora_da", "lora"] = setting(
        "lora_da", "lora_da: initialise the adapter from the training data. lora: PEFT's own initialisation."
    )
    init_from: str | None = setting(
        None,
        "Start from a stored LoRA-DA initialisation, without a pass over the data: a folder, or user/repo@revision on "
        "the Hub.",
    )
    search_step: bool = setting(
        False, "With --init_from: search the step anew on the training data instead of taking the stored one."
    )


def refuse(is_wrong: Any, message: str) -> None:
    """Raise a ConfigError if flags contradict each other."""
    if is_wrong:
        raise ConfigError(message)


@dataclass
class Arguments:
    """Everything the command line says.

    Raises:
        ConfigError, DataError: if flags contradict each other, or name what is not there.
    """

    model: NamedModelArguments
    data: DataArguments
    adapter: AdapterArguments
    da: LoRADAArguments
    training: TrainingArguments

    def __post_init__(self) -> None:
        self.da.to_config()
        data, training, has_rows = self.data, self.training, self.data.dataset_name or self.data.train_file
        refuse(self.adapter.init_from and self.adapter.init != "lora_da", "leave --init lora out, or --init_from")
        refuse(not self.model.model_name_or_path, "--model_name_or_path is missing")
        refuse(not (training.do_train or training.do_eval), "nothing to do: give --do_train, --do_eval or both")
        of_training = {"init_from": self.adapter.init_from, "resume_from_checkpoint": training.resume_from_checkpoint}
        asked = [f"--{name}" for name, value in of_training.items() if value and not training.do_train]
        refuse(asked, f"{' and '.join(asked)} means nothing without --do_train: the base model is evaluated")
        refuse(self.adapter.search_step and not self.adapter.init_from, "--search_step needs --init_from")
        files = data.train_file or data.validation_file
        refuse(data.dataset_name and files, "give --dataset_name or files of data, not both")
        refuse(training.do_train and not has_rows, "--do_train needs data: give --dataset_name or --train_file")
        refuse(training.do_eval and not (has_rows or files), "--do_eval needs data: give --dataset_name or a file")
        refuse(
            data.streaming and training.do_train and training.max_steps <= 0,
            "--streaming has no length: give --max_steps",
        )
        training.resume_from_checkpoint = find_checkpoint(training)


def parse_arguments(argv: list[str]) -> Arguments:
    """Read flags, and a config file whose values the flags override.

    Args:
        argv: The command line without the program's name.

    Returns:
        The checked arguments. A mistake ends the program with a message and exit status 2.
    """
    parser = HfArgumentParser(
        (NamedModelArguments, DataArguments, AdapterArguments, LoRADAArguments, TrainingArguments),
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog="A .json, .yaml or .yml file, as first argument or after --config, holds names and values of "
        "flags. Flags on the command line override it.",
    )
    path, flags = split_off_config(argv)
    if path is not None:
        parser.set_defaults(**read_config(parser, path))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]!r}.{suggestion(parser, unknown[0])}")
        return Arguments(*parsed)
    except ValueError as error:
        parser.error(str(error))


def split_off_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take the config file, if there is one, out of the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, flags = finder.parse_known_args(argv)
    if found.config is None and flags and flags[0].endswith(CONFIG_SUFFIXES) and not flags[0].startswith("-"):
        return flags[0], flags[1:]
    return found.config, flags


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Read the settings of a config file; the parser checks text as it checks flags."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"config file {path} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"config file {path} must hold names and values of flags, not a {type(values).__name__}")
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            parser.error(f"config file {path}: unknown setting {name!r}.{suggestion(parser, str(name))}")
    for action in parser._actions:  # argparse checks choices on the command line alone
        if action.choices and action.dest in values and values[action.dest] not in action.choices:
            parser.error(f"config file {path}: {action.dest} must be one of {', '.join(map(str, action.choices))}")
    return values


def suggestion(parser: argparse.ArgumentParser, name: str) -> str:
    """Name the flag that was probably meant."""
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    return do_you_mean(name.lstrip("-").partition("=")[0], known) or " --help lists all."


def find_checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from, `last` being the newest in the output folder."""
    wanted = training.resume_from_checkpoint
    if wanted != "last":
        return wanted
    newest = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    refuse(newest is None, f"--resume_from_checkpoint last: {training.output_dir} holds no checkpoint")
    return newest


# ------------------------------------------------------------------------------------------------------ data


def load_rows(data: DataArguments, model: NamedModelArguments, training: TrainingArguments) -> dict[str, Rows]:
    """Load the splits that the run needs, and hold out validation rows if there are none.

    Returns:
        Untokenised rows under `train` and `validation`, as far as the run needs them.
    """
    if data.dataset_name:
        splits = load_data_set(data.dataset_name, data.dataset_config_name, streaming=data.streaming)
        found = {name: splits[name] for name in ("train", "validation") if name in splits}
    else:
        train = [data.train_file] if isinstance(data.train_file, str) else data.train_file  # of a config file
        validation = data.validation_file and [data.validation_file]
        files = (("train", train, data.data_weights), ("validation", validation, None))
        found = {
            name: mixed(paths, [load_file(path, streaming=data.streaming) for path in paths], data, weights)
            for name, paths, weights in files
            if paths
        }
    if training.do_train and "train" not in found:
        raise DataError(f"{data.dataset_name} has no `train` split, only {sorted(splits)}.")
    if training.do_eval and "validation" not in found:
        found = hold_out(found, data)
    wanted = {"train": training.do_train, "validation": training.do_eval}
    return {name: rows for name, rows in found.items() if wanted[name]}


def hold_out(found: dict[str, Rows], data: DataArguments) -> dict[str, Rows]:
    """Split validation rows off the training rows: the same rows whatever the training seed is."""
    if "train" not in found:
        raise DataError(f"{data.dataset_name} has neither a `train` nor a `validation` split.")
    if data.streaming:
        raise DataError("With --streaming no rows can be held out for --do_eval: give --validation_file.")
    count = max(1, len(found["train"]) * data.validation_split_percentage // 100)
    parts = found["train"].train_test_split(test_size=count, seed=SPLIT_SEED)
    logger.info("No validation data: held out are %d of %d training rows.", count, len(found["train"]))
    return {"train": parts["train"], "validation": parts["test"]}


def prepare_samples(
    rows: dict[str, Rows], tokenizer: PreTrainedTokenizerBase, block_size: int, arguments: Arguments
) -> dict[str, Rows]:
    """Tokenise every split and keep at most as many samples as asked for."""
    data = arguments.data
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    samples = {}
    for name, split in rows.items():
        found = tokenize(name, split, tokenizer, block_size, data)
        count = limits[name]
        if count is not None:
            found = found.take(count if isinstance(found, IterableDataset) else min(count, len(found)))
        if name == "train" and data.streaming:
            found = found.shuffle(seed=arguments.training.data_seed, buffer_size=SHUFFLE_BUFFER)
        samples[name] = found
    return samples


# ----------------------------------------------------------------------------------------- model and trainer


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: dict[str, Rows], arguments: Arguments
) -> Trainer:
    """Make the trainer. Only the class and the adapter's initialisation depend on `--init`."""
    collator = DataCollatorForSeq2Seq(tokenizer) if arguments.data.by_row else default_data_collator
    shared = {
        "args": arguments.training,
        "train_dataset": samples.get("train"),
        "eval_dataset": samples.get("validation"),
        "data_collator": collator,
        "processing_class": tokenizer,
    }
    set_seed(arguments.training.seed)  # so that both start from the same random adapter
    model = with_adapter(model, arguments.adapter.to_peft())
    if arguments.adapter.init == "lora":
        if arguments.da.da_freeze_a:
            freeze_a(model)
        return Trainer(model=model, **shared)
    return LoRADATrainer(
        model=model,
        da_config=arguments.da.to_config(),
        init_from=arguments.adapter.init_from,
        search_step=arguments.adapter.search_step,
        **shared,
    )


# ------------------------------------------------------------------------------------------------------- run


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, then save the adapter and the metrics."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    if not isinstance(trainer.train_dataset, IterableDataset):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return loss and perplexity on the validation data, and save them."""
    metrics = last_evaluation(trainer) or trainer.evaluate()
    if not isinstance(trainer.eval_dataset, IterableDataset):
        metrics["eval_samples"] = len(trainer.eval_dataset)
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def last_evaluation(trainer: Trainer) -> dict[str, float] | None:
    """Return what training evaluated after its last step, if the weights are still those."""
    if trainer.args.load_best_model_at_end:
        return None
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step > 0:
            return {name: value for name, value in entry.items() if name != "step"}
    return None


def draw_loss_curve(history: list[dict[str, float]], path: Path) -> None:
    """Plot training and validation loss by step, each if it was logged twice; without matplotlib, say so instead."""
    curves = {label: [(x["step"], x[name]) for x in history if name in x] for name, label in LOSSES.items()}
    curves = {label: points for label, points in curves.items() if len(points) > 1}  # one dot is no curve
    if not curves:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No loss curve: matplotlib is not installed. `pip install matplotlib` brings it.")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else "")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def set_up_logging(training: TrainingArguments) -> None:
    """Log at the level that the flags ask for, less on all ranks but the first."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = training.get_process_log_level()
    for name in (logger.name, "lora_da_hf"):
        logging.getLogger(name).setLevel(logging.INFO if training.should_log else logging.ERROR)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)
    if not training.should_log:
        datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the program, and return the evaluation's metrics; ``argv`` is the command line without its name."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    training = arguments.training
    set_up_logging(training)
    if training.should_save:
        check_writable(Path(training.output_dir))
    if training.data_seed is None:
        training.data_seed = training.seed  # so that no draw before training can change the order of the data
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False
    with training.main_process_first(desc="load the data"):
        rows = load_rows(arguments.data, arguments.model, training)
    model, tokenizer = load_model(arguments.model.model_name_or_path, arguments.model)
    block_size = choose_block_size(arguments.data.block_size, model, tokenizer)
    with training.main_process_first(desc="tokenise the data"):
        samples = prepare_samples(rows, tokenizer, block_size, arguments)
    trainer = make_trainer(model, tokenizer, samples, arguments)
    if training.do_train:
        train(trainer, training.resume_from_checkpoint)
    metrics = evaluate(trainer) if training.do_eval else {}
    if training.do_train:
        trainer.save_state()
        if trainer.is_world_process_zero():
            draw_loss_curve(trainer.state.log_history, Path(training.output_dir) / "loss_curve.png")
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    try:
        main()
    except (LoRADAError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        sys.exit(f"run_clm.py: error: {explain(error)}")
