"""The command line itself: help, exit codes, and what goes where."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from lora_da_hf.cli.main import VERBS
from lora_da_hf.cli.verbs import explain, printable
from lora_da_hf.errors import ConfigError

NAMES = list(VERBS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["init", "a", "b", "c", "--da_num_sample", "16"], "(?s).*arguments: --da_num_sample.*'--da_num_samples'"),
        (["show", "a", "b", "c"], "(?s).*unrecognized arguments: b c"),
        (["list", "--auhtor=me"], "(?s).*'--author'"),
        (["--json", "list"], "(?s).*unrecognized arguments: --json"),
        (["no-such-verb"], "(?s).*invalid choice"),
        (["show"], "(?s).*arguments are required: FOLDER"),
        (["show", "a", "--json", "--quiet"], "(?s).*not allowed with"),
        (["init", "model", "data.jsonl", "out", "--da_factor_split", "magic"], "(?s).*invalid choice"),
    ],
)
def test_mistakes_in_the_command_line_leave_with_2(lora_da, words, told):
    code, out, err = lora_da(*words)
    assert (code, out) == (2, "")
    assert re.match(told, err)


@pytest.mark.parametrize("words", [["--help"], *[[name, "--help"] for name in NAMES]], ids=["all", *NAMES])
def test_every_help_shows_an_example_and_takes_no_token(lora_da, words):
    code, out, err = lora_da(*words)
    assert (code, err) == (0, "")
    assert f"lora-da {words[0] if len(words) > 1 else 'init'} " in out.split("example", 1)[1]
    assert not re.search(r"--token\b", out)


def test_help_shows_every_setting_and_defaults_once(lora_da):
    text = " ".join(lora_da("init", "--help")[1].split())
    for flag in ("--da_num_samples", "--da_input_damping", "--lora_rank", "--target_modules", "--prompt_column"):
        assert flag in text
    assert "Rank of the adapter. (default: 8)" in text
    assert "(default: 0.1*mean)" in text
    assert "(default: None)" not in text


@pytest.mark.parametrize(
    "words", [[], ["--version"], ["init", "--help"], ["refit", "-h"], ["plan", "m", "--x"], ["list"]]
)
def test_help_mistakes_and_a_list_do_not_import_torch(words):
    code = (
        "import sys\n"
        "from lora_da_hf.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'datasets')))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, env=environment)


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_leaves_with_1_and_the_traceback_is_shown_if_asked_for(lora_da, tmp_path, debug):
    code, out, err = lora_da("show", tmp_path, *(["--debug"] if debug else []))
    assert (code, out) == (1, "")
    assert str(tmp_path) in err
    assert err.splitlines()[-1].startswith("Error: ")
    assert ("Traceback" in err) == debug
    assert debug or err.count("\n") == 1


def test_an_interruption_leaves_with_130(lora_da, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "show", replace(VERBS["show"], run=interrupt))
    assert lora_da("show", tmp_path) == (130, "", "Stopped.\n")


def test_what_a_library_prints_is_no_result_and_a_warning_is_a_line(lora_da, tmp_path, monkeypatch):
    def run(arguments, output):
        print("a library's greeting")
        warnings.warn("a name will change", FutureWarning, stacklevel=1)
        warnings.warn("the base is gated", UserWarning, stacklevel=1)
        output.result({"a": 1}, bare="", text="")

    monkeypatch.setitem(VERBS, "show", replace(VERBS["show"], run=run))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        told = lora_da("show", tmp_path, "--json")
    assert told == (0, '{"a":1}\n', "a library's greeting\nWarning: the base is gated\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("Raise it."), "Raise it."),
        (OSError("no-model is not a local folder"), "no-model is not a local folder Check the name"),
        (OSError(28, "No space left on device", "init/x"), "No space left on device: 'init/x'"),
        (SafetensorError("I/O error: No space left on device"), "No space left on device Run it again with --debug"),
        (ZeroDivisionError("division"), "ZeroDivisionError: division"),
    ],
)
def test_errors_are_explained(error, message):
    assert message in explain(error)


def test_names_from_elsewhere_cannot_take_over_the_terminal():
    assert printable("a\x1b[2Jb\nc\u202ed") == "a�[2Jb\nc�d"
