"""What is published passes the index's checks, and the template is in the wheel, where the code looks for it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installed_wheel_renders_a_card(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "outputs", "tests")
    source = shutil.copytree(REPOSITORY, tmp_path / "source", ignore=ignored)
    run = [sys.executable, "-m"]
    subprocess.run([*run, "build", "--no-isolation", "--outdir", tmp_path / "dist"], cwd=source, check=True)
    files = sorted((tmp_path / "dist").iterdir())
    subprocess.run([*run, "twine", "check", "--strict", *files], check=True)
    wheel, sdist = files
    assert (wheel.suffix, sdist.name.endswith(".tar.gz")) == (".whl", True)
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.rpartition("/")[0] for name in archive.namelist()}
        archive.extractall(tmp_path / "installed")
    packages = REPOSITORY.glob("lora_da_hf/**/__init__.py")
    assert {path.parent.relative_to(REPOSITORY).as_posix() for path in packages} <= folders
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import lora_da_hf.hub.cards as cards;"
        "print(cards.__file__, cards._template().name)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    installed = tmp_path / "installed" / "lora_da_hf" / "hub" / "cards.py"
    assert shown.stdout.split() == [str(installed), "init_card.md.jinja"]
