"""The entry point: it finds the verb, parses its flags, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
import warnings
from typing import Any, NamedTuple

from lora_da_hf.cli.output import Output, explain, printable

DEBUG_VARIABLE = "LORA_DA_DEBUG"


class Verb(NamedTuple):
    """One verb: its module has the functions ``<name>_flags`` and ``run_<name>``."""

    name: str
    module: str
    summary: str
    example: str


VERBS = (
    Verb("init", "compute", "Compute an initialisation from data and store it in a folder.",
         "MODEL train.jsonl my-init --prompt_column question --completion_column answer --lora_rank 16"),
    Verb("plan", "compute", "Tell the passes and the memory that an initialisation takes, from the model's config.",
         "meta-llama/Llama-3.1-8B --lora_rank 16 --world_size 4 --da_memory_budget 20GiB"),
    Verb("show", "stored", "Show what is in a stored initialisation: a table, and plots if asked for.",
         "my-init --plots plots"),
    Verb("refit", "stored", "Make another initialisation: a smaller rank, or other settings from stored statistics.",
         "my-init my-init-damped --rank 4 --da_input_damping 0.3*mean"),
    Verb("verify", "stored", "Check every file of a stored initialisation, and that it belongs to a base model.",
         "my-init --base_model HuggingFaceTB/SmolLM2-135M"),
    Verb("card", "stored", "Render the card of a stored initialisation.",
         "my-init --license apache-2.0 --datasets gsm8k --language en --output card"),
    Verb("push", "share", "Publish a stored initialisation on the Hub, private unless asked otherwise.",
         "my-init user/my-init --create_pr"),
    Verb("pull", "share", "Fetch an initialisation from the Hub and check it.", "user/my-init@v1 --quiet"),
    Verb("list", "share", "List the initialisations on the Hub.", "--base_model HuggingFaceTB/SmolLM2-135M --limit 20"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command, and return its exit code. A command line that cannot be parsed leaves with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # redirected output is UTF-8 on every system
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    first = next((word for word in words if not word.startswith("-")), None)
    verb = next((verb for verb in VERBS if verb.name == first), None)
    module: Any = importlib.import_module(f"lora_da_hf.cli.{verb.module}") if verb else None
    parser, flags = make_parser(verb, module)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.exit(2, f"{flags.prog}: error: {_not_known(unknown, flags)}\n")
    if verb is None:
        parser.print_help()
        return 0
    output = Output(as_json=arguments.json, quiet=arguments.quiet)
    debug = arguments.debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # a library's output is not a result
            if not debug:  # what a library plans to rename is of no use here
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = lambda message, *_, **__: print(
                    printable(f"Warning: {message}"), file=sys.stderr
                )
            output.hide_progress()
            getattr(module, f"run_{verb.name}")(arguments, output)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough, as in `lora-da list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(printable(f"Error: {explain(error)}"), file=sys.stderr)
        return 1
    return 0


def make_parser(verb: Verb | None, module: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser, and the one of the verb, which alone has flags."""
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
    parser.add_argument("--version", action="version", version=importlib.metadata.version("lora_da_hf"))
    verbs, flags = parser.add_subparsers(title="verbs", metavar="VERB"), parser
    for each in VERBS:
        one = verbs.add_parser(
            each.name,
            help=each.summary,
            description=each.summary,
            epilog=f"example:\n  lora-da {each.name} {each.example}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        if each is verb:
            flags = one
            getattr(module, f"{each.name}_flags")(one)
            form = one.add_mutually_exclusive_group()
            form.add_argument("--json", action="store_true", help="print the result as one JSON object")
            form.add_argument("--quiet", "-q", action="store_true", help="print the bare value and no messages")
            one.add_argument("--debug", action="store_true", help=f"show tracebacks ({DEBUG_VARIABLE}=1 too)")
    return parser, flags


def _not_known(words: list[str], flags: argparse.ArgumentParser) -> str:
    known = [option for action in flags._actions for option in action.option_strings]
    close = difflib.get_close_matches(words[0].partition("=")[0], known, n=1)
    advice = f"Did you mean {flags.prog} {close[0]}?" if close else f"`{flags.prog} --help` lists all."
    return f"unrecognized arguments: {' '.join(words)}. {advice}"


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text.lower():
            text += " (default: %(default)s)"
        return text
