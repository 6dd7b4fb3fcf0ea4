"""The command line itself: help, exit codes, and what goes where."""

import json
import re
import subprocess
import sys
import warnings
from argparse import ArgumentTypeError
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import HfArgumentParser

from lora_da_hf.cli.errors import explain
from lora_da_hf.cli.flags import dataclass_flags
from lora_da_hf.cli.main import DEBUG_VARIABLE, VERBS
from lora_da_hf.cli.output import Output, printable
from lora_da_hf.errors import ConfigError, LoRADAError
from lora_da_hf.training.arguments import LoraArguments, LoRADAArguments, ModelArguments, TextArguments

NAMES = [verb.name for verb in VERBS]


def test_the_verbs_are_those_of_the_documentation():
    assert NAMES == ["init", "plan", "show", "refit", "verify", "card", "push", "pull", "list"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["init", "a", "b", "c", "--da_num_sample", "16"], "lora-da init: error: .* Did you mean --da_num_samples"),
        (["refit", "a", "b", "--lora_rank=4"], "lora-da refit: error: .*--lora_rank=4. "),
        (["show", "a", "b", "c"], r"lora-da show: error: unrecognized arguments: .* `lora-da show --help` lists all"),
        (["--json", "list"], "lora-da list: error: .*--json. Flags come behind the verb: lora-da list --json"),
        (["--jsn"], "lora-da: error: unrecognized arguments: --jsn. `lora-da --help` lists all"),
    ],
)
def test_words_that_mean_nothing_are_told_with_what_was_meant(lora_da, words, told):
    code, out, err = lora_da(*words)
    assert (code, out) == (2, "")
    assert re.match(told, err)
    assert err.count("\n") == 1


def test_help_shows_defaults_once(lora_da):
    _, out, _ = lora_da("init", "--help")
    text = " ".join(out.split())
    assert "Rank of the adapter. (default: 8)" in text
    assert "(default: 0.1*mean)" in text
    assert "(default: None)" not in text


@pytest.mark.parametrize("words", [["--help"], *[[name, "--help"] for name in NAMES]], ids=["all", *NAMES])
def test_every_help_shows_an_example(lora_da, words):
    code, out, err = lora_da(*words)
    assert code == 0
    assert "example" in out
    assert f"lora-da {words[0] if len(words) > 1 else 'init'} " in out.split("example", 1)[1]
    assert err == ""


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["--version"], *([name, "--help"] for name in NAMES), ["init", "no-data"], ["plan", "m", "--x"]],
    ids=" ".join,
)
def test_help_and_mistakes_do_not_import_torch(words):
    code = (
        "import sys\n"
        "from lora_da_hf.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


@pytest.mark.parametrize("kind", [LoraArguments, TextArguments, ModelArguments, LoRADAArguments])
def test_flags_are_those_that_transformers_makes_of_a_dataclass(kind):
    found, expected = dataclass_flags(kind), HfArgumentParser(kind, add_help=False)
    what = ("option_strings", "dest", "nargs", "const", "default", "required")
    facts = [[[getattr(action, name) for name in what] for action in parser._actions] for parser in (found, expected)]
    assert facts[0] == facts[1]
    for action, other in zip(found._actions, expected._actions, strict=True):
        assert action.help.startswith(other.help)
        assert list(action.choices or ()) == list(other.choices or ())
        if action.nargs != 0:
            for text in (*(action.choices or ()), "3", "yes", "False", "0.5"):
                assert parsed(action, text) == parsed(other, text), (action.dest, text)


def parsed(action, text):
    try:
        return action.type(text)
    except (ValueError, ArgumentTypeError):
        return ValueError


def test_every_setting_is_a_flag_of_init(lora_da):
    _, out, _ = lora_da("init", "--help")
    for flag in ("--da_num_samples", "--da_input_damping", "--lora_rank", "--target_modules", "--prompt_column"):
        assert flag in out


@pytest.mark.parametrize("verb", NAMES)
def test_no_verb_takes_a_token(lora_da, verb):
    _, out, _ = lora_da(verb, "--help")
    assert not re.search(r"--token\b", out)


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-verb"],
        ["show"],
        ["show", "a", "b"],
        ["show", "a", "--no_such_flag"],
        ["pull", "a/b", "--rank", "0"],
        ["plan", "a", "--world_size", "0"],
        ["show", "a", "--json", "--quiet"],
        ["init", "model", "data.jsonl", "out", "--da_solver", "magic"],
    ],
)
def test_mistakes_in_the_command_line_leave_with_2(lora_da, words):
    code, out, err = lora_da(*words)
    assert code == 2
    assert out == ""
    assert "error: " in err


def test_an_error_is_two_lines_at_most_and_leaves_with_1(lora_da, tmp_path):
    code, out, err = lora_da("show", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert "this is not a LoRA-DA initialisation" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_is_shown_if_asked_for(lora_da, tmp_path, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv(DEBUG_VARIABLE, "1")
    _, _, err = lora_da("show", tmp_path, *(["--debug"] if how == "flag" else []))
    assert "Traceback" in err
    assert "Error: " in err


def test_an_interruption_leaves_with_130(lora_da, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_da_hf.cli.examine.run_show", interrupt)
    assert lora_da("show", tmp_path) == (130, "", "Stopped.\n")


def test_what_a_library_prints_is_no_result(lora_da, tmp_path, monkeypatch):
    def run(arguments, output):
        print("a library's greeting")
        warnings.warn("a name will change", FutureWarning, stacklevel=1)
        output.result({"a": 1}, bare="", text="")

    monkeypatch.setattr("lora_da_hf.cli.examine.run_show", run)
    assert lora_da("show", tmp_path, "--json") == (0, '{"a":1}\n', "a library's greeting\n")


def test_a_warning_is_a_line_without_its_place_in_the_code(lora_da, tmp_path, monkeypatch):
    def run(arguments, output):
        warnings.simplefilter("always")
        warnings.warn("the base is gated", UserWarning, stacklevel=1)

    monkeypatch.setattr("lora_da_hf.cli.examine.run_show", run)
    assert lora_da("show", tmp_path) == (0, "", "Warning: the base is gated\n")


def hub_error(kind, status=404):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("it failed\nin detail", response=response)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (ConfigError("Raise it."), "Raise it.", None),
        (OSError("no-model is not a local folder"), "no-model is not", "Check the name"),
        (OSError(28, "No space left on device", "init/x"), "No space left on device: 'init/x'", "Make room"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full: Error while serializing",
            "Make room or choose another folder",
        ),
        (SafetensorError("Error while deserializing header"), "unexpected SafetensorError", "--debug"),
        (FileNotFoundError(2, "No such file or directory", "data"), "directory: 'data'", "Check the path."),
        (PermissionError(13, "Permission denied", "data"), "denied: 'data'", "Check who may read and write it."),
        (OSError(30, "Read-only file system", "init"), "Read-only", "Choose a folder that can be written."),
        (OSError(5, "Input/output error", "data"), "Input/output error: 'data'", "--debug"),
        (ZeroDivisionError("division"), "unexpected ZeroDivisionError: division", "--debug"),
        (hub_error(hub_errors.GatedRepoError, 403), "gated", "Ask for access"),
        (hub_error(hub_errors.RepositoryNotFoundError), "does not exist, or you may not see it", "hf auth login"),
        (hub_error(hub_errors.RevisionNotFoundError), "no such revision", "a tag"),
        (hub_error(hub_errors.HfHubHTTPError, 403), "it failed", "HF_TOKEN"),
        (hub_error(hub_errors.HfHubHTTPError, 503), "it failed", "HF_ENDPOINT"),
        (hub_errors.OfflineModeIsEnabled("offline"), "offline", "HF_HUB_OFFLINE"),
        (hub_errors.LocalTokenNotFoundError("none"), "not logged in", "hf auth login"),
    ],
)
def test_errors_are_explained(error, message, hint):
    found, advice = explain(error)
    assert message in found
    assert (advice is None) if hint is None else (hint in advice)


def test_a_file_that_is_not_there_or_no_file_is_not_explained_by_a_full_disk(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(OSError, match=path.name) as caught:
            path.read_bytes()
        assert explain(caught.value) == (str(caught.value), "Check the path.")


def test_errors_of_the_library_speak_for_themselves():
    assert explain(LoRADAError("Do this.")) == ("Do this.", None)


def test_results_have_three_forms(capsys):
    for output, expected in (
        (Output(as_json=True), '{"a":1,"b":null}\n'),
        (Output(quiet=True), "bare\n"),
        (Output(), "for people\n"),
    ):
        output.result({"a": 1, "b": None}, bare="bare", text="for people")
        assert capsys.readouterr() == (expected, "")


def test_messages_go_to_stderr_and_are_silenced(capsys):
    Output().message("working")
    assert capsys.readouterr() == ("", "working\n")
    Output(quiet=True).message("working")
    assert capsys.readouterr() == ("", "")


def test_progress_bars_are_for_people(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert Output().shows_progress
    assert not Output(as_json=True).shows_progress
    assert not Output(quiet=True).shows_progress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not Output().shows_progress


def test_names_from_elsewhere_cannot_take_over_the_terminal():
    assert printable("a\x1b[2Jb\nc\u202ed") == "a�[2Jb\nc�d"


def test_json_is_one_line_of_ascii(capsys):
    Output(as_json=True).result({"name": "é\n\x1b"}, bare="", text="")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.isascii()
    assert json.loads(line) == {"name": "é\n\x1b"}
