"""The entry point: it finds the verb, parses its flags, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from lora_da_hf.cli.errors import explain
from lora_da_hf.cli.output import Output, printable

DEBUG_VARIABLE = "LORA_DA_DEBUG"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb.

    Attributes:
        name: What is typed.
        home: Module that has the functions ``<name>_parser`` and ``run_<name>``.
        summary: What it does.
        examples: Command lines that its help shows.
    """

    name: str
    home: str
    summary: str
    examples: tuple[str, ...]


VERBS = (
    Verb(
        name="init",
        home="lora_da_hf.cli.compute",
        summary="Compute an initialisation from data and store it in a folder.",
        examples=(
            "lora-da init HuggingFaceTB/SmolLM2-135M train.jsonl my-init --prompt_column question "
            "--completion_column answer --lora_rank 16 --da_num_samples 128",
        ),
    ),
    Verb(
        name="plan",
        home="lora_da_hf.cli.compute",
        summary="Tell how much memory and time an initialisation will take. Nothing but the model's config is read.",
        examples=("lora-da plan meta-llama/Llama-3.1-8B --lora_rank 16 --world_size 4 --da_memory_budget 20GiB",),
    ),
    Verb(
        name="show",
        home="lora_da_hf.cli.examine",
        summary="Show what is in a stored initialisation: a table, and plots if asked for.",
        examples=("lora-da show my-init --plots plots",),
    ),
    Verb(
        name="refit",
        home="lora_da_hf.cli.refit",
        summary="Make another initialisation from a stored one: a smaller rank, or other settings from its statistics.",
        examples=(
            "lora-da refit my-init my-init-r4 --rank 4",
            "lora-da refit my-init my-init-damped --da_input_damping 0.3*mean",
        ),
    ),
    Verb(
        name="verify",
        home="lora_da_hf.cli.examine",
        summary="Check every file of a stored initialisation, and that it belongs to a base model.",
        examples=("lora-da verify my-init --base_model HuggingFaceTB/SmolLM2-135M",),
    ),
    Verb(
        name="card",
        home="lora_da_hf.cli.examine",
        summary="Render the card of a stored initialisation.",
        examples=("lora-da card my-init --license apache-2.0 --datasets gsm8k --language en --output card",),
    ),
    Verb(
        name="push",
        home="lora_da_hf.cli.share",
        summary="Publish a stored initialisation on the Hub, private unless asked otherwise.",
        examples=("lora-da push my-init user/my-init", "lora-da push my-init user/my-init --public --create_pr"),
    ),
    Verb(
        name="pull",
        home="lora_da_hf.cli.share",
        summary="Fetch an initialisation from the Hub and check it.",
        examples=("lora-da pull user/my-init", "lora-da pull user/my-init@v1 --quiet"),
    ),
    Verb(
        name="list",
        home="lora_da_hf.cli.share",
        summary="List the initialisations on the Hub.",
        examples=("lora-da list --base_model HuggingFaceTB/SmolLM2-135M --limit 20",),
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The exit code: 0, or 1 if it failed. A command line that cannot be parsed leaves with 2, as argparse does.
    """
    _write_utf8()
    words = sys.argv[1:] if argv is None else argv
    verb = next((verb for verb in VERBS if verb.name == _first_word(words)), None)
    parser = make_parser(verb)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.exit(2, f"lora-da{f' {verb.name}' if verb else ''}: error: {_not_known(unknown, verb)}\n")
    if verb is None:
        parser.print_help()
        return 0
    output = Output(as_json=arguments.json, quiet=arguments.quiet)
    debug = arguments.debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # a library's output is no result
            if not debug:  # what a library plans to rename is of no use here
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = _show_warning
            getattr(importlib.import_module(verb.home), f"run_{verb.name}")(arguments, output)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough, as in `lora-da list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, hint = explain(error)
        print(printable(f"Error: {message}" + (f"\nHint: {hint}" if hint else "")), file=sys.stderr)
        return 1
    return 0


def _not_known(words: list[str], verb: Verb | None) -> str:
    """Say which words mean nothing, and what was probably meant by the first."""
    flags = [] if verb is None else _flags_of(verb)
    known = [option for part in flags for action in part._actions for option in action.option_strings]
    flag = words[0].partition("=")[0]
    close = difflib.get_close_matches(flag, known, n=1)
    advice = f"Did you mean {close[0]}?" if close else f"`lora-da {f'{verb.name} ' if verb else ''}--help` lists all."
    if verb is not None and flag in known:
        advice = f"Flags come behind the verb: lora-da {verb.name} {flag}"
    return f"unrecognized arguments: {' '.join(words)}. {advice}"


def _flags_of(verb: Verb) -> list[argparse.ArgumentParser]:
    return [getattr(importlib.import_module(verb.home), f"{verb.name}_parser")(), _common_flags()]


def _write_utf8() -> None:
    """Let redirected output be UTF-8 on every system, and a terminal show what it can of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def make_parser(verb: Verb | None) -> argparse.ArgumentParser:
    """Make the parser. Only the flags of ``verb`` are added: those of others would have to be imported."""
    parser = argparse.ArgumentParser(
        prog="lora-da",
        description="Compute, look into and share LoRA initialisations.",
        epilog="example:\n"
        "  lora-da init MODEL train.jsonl my-init --prompt_column prompt --completion_column completion\n\n"
        "`lora-da VERB --help` shows the flags of a verb. Tokens for the Hub come\n"
        "from `hf auth login` or HF_TOKEN, and the endpoint from HF_ENDPOINT.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and leave")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for each in VERBS:
        flags = _flags_of(each) if each is verb else []
        verbs.add_parser(
            each.name,
            help=each.summary,
            description=each.summary,
            epilog="\n".join(
                ["example:" if len(each.examples) == 1 else "examples:", *(f"  {e}" for e in each.examples)]
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=flags,
            allow_abbrev=False,
        )
    return parser


def _common_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    form = flags.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as one JSON object")
    form.add_argument("--quiet", "-q", action="store_true", help="print the bare value and no messages")
    flags.add_argument("--debug", action="store_true", help=f"show the traceback of an error ({DEBUG_VARIABLE}=1 too)")
    return flags


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(printable(f"Warning: {message}"), file=sys.stderr)


def _first_word(words: list[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(importlib.metadata.version("lora_da_hf"))
        parser.exit()
