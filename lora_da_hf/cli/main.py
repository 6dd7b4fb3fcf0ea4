"""The entry point: it finds the verb, parses its flags, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
import traceback
import warnings
from typing import Any

from lora_da_hf.cli import compute, stored
from lora_da_hf.cli.verbs import Output, Verb, explain, printable
from lora_da_hf.errors import do_you_mean

VERBS = {n.rstrip("_"): verb for n, verb in (vars(compute) | vars(stored)).items() if isinstance(verb, Verb)}


def main(argv: list[str] | None = None) -> int:
    """Run one command, and return its exit code. A command line that cannot be parsed leaves with 2."""
    words = sys.argv[1:] if argv is None else argv
    arguments = make_parser(words[:1]).parse_args(words)
    output = Output(as_json=arguments.json, quiet=arguments.quiet)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # a library's output is not a result
            if not arguments.debug:  # what a library plans to rename is of no use here
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = lambda message, *_, **__: output.message(f"Warning: {message}", always=True)
            output.hide_progress()
            arguments.run(arguments, output)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(printable(f"Error: {explain(error)}"), file=sys.stderr)
        return 1
    return 0


def make_parser(chosen: list[str]) -> argparse.ArgumentParser:
    """Return the parser, with the flags of the chosen verb alone: some take long to import."""
    parser = _Parser(
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
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        own = verbs.add_parser(
            name,
            help=verb.run.__doc__,
            description=verb.run.__doc__,
            epilog=f"example:\n  lora-da {name} {verb.example}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        if name in chosen:
            for add in verb.flags:
                add(own)
            either = own.add_mutually_exclusive_group()
            either.add_argument("--json", action="store_true", help="print the result as one JSON object")
            either.add_argument("--quiet", "-q", action="store_true", help="print the bare value and no messages")
            own.add_argument("--debug", action="store_true", help="show tracebacks")
            own.set_defaults(run=verb.run)
    return parser


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, and suggest a name for the first flag that is not known: only a verb's own parser knows its flags."""
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{do_you_mean(flag, self._option_string_actions)}")
        return found, unknown


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text.lower():
            text += " (default: %(default)s)"
        return text
