"""Real training data that every machine has: the documented functions of Python's standard library.

A prompt is a function's signature with its docstring, the completion is the body that its authors wrote.
Whole modules are held out for validation, so no validation function has a neighbour in the training data.
"""

import ast
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "turtledemo"} | {
    *("idle_test", "test", "tests")
}
MIN_TOKENS = 48
MAX_TOKENS = 192
VALIDATION_SHARE = 0.15
MIN_ROWS = 64


@dataclass(frozen=True)
class Function:
    """A documented function, split after its docstring."""

    module: str
    prompt: str
    completion: str


def write_data(folder: Path, count_tokens: Callable[[str], int], library: Path | None = None) -> tuple[Path, Path]:
    """Write train.jsonl and validation.jsonl, unless they are there already.

    Args:
        folder: Where the two files go. It is made in one move, so it is complete or not there.
        count_tokens: Length of a text for the model.
        library: Folder with Python sources. None: this Python's standard library.

    Returns:
        The paths of the training and the validation file.

    Raises:
        RuntimeError: if there are too few functions.
    """
    files = folder / "train.jsonl", folder / "validation.jsonl"
    if all(file.is_file() for file in files):
        return files
    library = library or Path(sysconfig.get_paths()["stdlib"])
    functions = [f for f in collect(library) if MIN_TOKENS <= count_tokens(f.prompt + f.completion) <= MAX_TOKENS]
    train, validation = split(functions)
    if len(train) < MIN_ROWS or len(validation) < MIN_ROWS // 8:
        raise RuntimeError(
            f"Only {len(functions)} documented functions were found in {library}. The demo reads the sources of "
            "Python's standard library: run it with a Python that has them."
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    for file, rows in zip(files, (train, validation), strict=True):
        lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
        (partial / file.name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return files


def folder_name() -> str:
    """Name a data folder after the Python whose library fills it."""
    return f"stdlib-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


def collect(library: Path) -> list[Function]:
    """Collect the functions of all modules in an order that depends only on their text, without repetitions."""
    by_text: dict[str, Function] = {}
    for path in source_files(library):
        for function in read_functions(path, path.relative_to(library).as_posix()):
            by_text.setdefault(" ".join(function.completion.split()), function)
    return sorted(by_text.values(), key=lambda function: digest(function.prompt + function.completion))


def source_files(library: Path) -> Iterator[Path]:
    """List the modules of a library in a fixed order."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def read_functions(path: Path, module: str) -> Iterator[Function]:
    """Read the documented functions and methods of one module; a file that is not Python has none."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = source.split("\n")  # as Python's parser counts them; splitlines also breaks at form feeds
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = cut(node, lines, module)
                if function is not None:
                    yield function


def cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], module: str) -> Function | None:
    """Cut a function after its docstring; None if it has no docstring, or nothing after it."""
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    end_of_prompt, end = node.body[0].end_lineno, node.end_lineno
    if node.body[1].lineno <= end_of_prompt:
        return None
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).split("\n")
    cut_at = end_of_prompt - node.lineno + 1
    return Function(module, "\n".join(whole[:cut_at]) + "\n", "\n".join(whole[cut_at:]).strip("\n") + "\n")


def split(functions: list[Function]) -> tuple[list[Function], list[Function]]:
    """Split into training and validation functions, by whole modules."""
    held_out = {f.module for f in functions if digest(f.module) < VALIDATION_SHARE * 2**64}
    train = [function for function in functions if function.module not in held_out]
    return train, [function for function in functions if function.module in held_out]


def digest(text: str) -> int:
    """Return a number below 2**64 that is the same for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
