"""The page of what is supported says what the tests say, and nothing of a test that is not run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command):
    """Run Python in the root with the tests' folder and the scripts on the path. Returns the status and the output."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "scripts", "."))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def rows_of(path):
    return run("-c", f"import support_table as s; s.TESTS = ({str(path)!r},); print(s.table(s.collect_rows()))")


@pytest.mark.slow
def test_the_page_of_what_is_supported_is_what_the_tests_say():
    status, output = run("scripts/support_table.py", "--check")
    assert status == 0, output[-2000:]


ONE_ROW = """
@pytest.mark.support("PEFT", "one", "how")
@pytest.mark.parametrize("case", [1, 2])
def test_one(case):
    pass
"""
HIDDEN_OR_NOT_RUN = """
@pytest.mark.support("PEFT", "one", "how")
def test_same_name():
    pass

@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.support("PEFT", "cases", "")) for n in (1, 2)])
def test_cases(case):
    pass

@pytest.mark.skip
@pytest.mark.support("PEFT", "skipped", "")
def test_skipped():
    pass
"""
SKIPPING_ITSELF = """
@pytest.mark.parametrize("marked", [pytest.param(1, marks=pytest.mark.support("PEFT", "two", "")), 0])
@pytest.mark.parametrize("leave", [pytest.skip, pytest.xfail, lambda _: pytest.importorskip("no_such")])
def test_two(marked, leave):
    leave("why")
"""


def write(folder, *parts, name="test_rows.py"):
    path = folder / name
    path.write_text("\n".join(["import pytest", *parts]))
    return path


@pytest.mark.slow
def test_rows_that_hide_one_another_or_are_not_run_are_refused(tmp_path):
    write(tmp_path, ONE_ROW, HIDDEN_OR_NOT_RUN)
    write(tmp_path, "pytest.importorskip('no_such')", name="test_left_out.py")
    status, output = rows_of(tmp_path)
    assert status == 1
    for message in (
        "PEFT, one: two rows of one name, by ",
        "PEFT, cases: two rows of one name, by ",
        "is marked skip, and a row must be a test that runs",
        "test_left_out.py was skipped, with all its rows: install the extras",
    ):
        assert message in output


@pytest.mark.slow
def test_a_row_that_skips_itself_fails(tmp_path):
    path = write(tmp_path, SKIPPING_ITSELF)
    status, output = run("-m", "pytest", "-c", "pyproject.toml", "-p", "conftest", str(path))
    assert status == 1
    assert "3 failed, 2 skipped, 1 xfailed" in output
    assert output.count("a row of docs/support.md was not run to its end") >= 3
