"""The templates are where the code looks for them, in a wheel and in an editable installation."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installed_wheel_renders_a_card(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "outputs", "tests")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "lora_da_hf/hub_cards/init_card.md.jinja" in names
    packages = {path.parent.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("lora_da_hf/**/__init__.py")}
    assert packages <= {name.rsplit("/", 1)[0] for name in names}
    code = (
        "import lora_da_hf, lora_da_hf.hub.cards as cards; print(lora_da_hf.__file__);"
        "print(cards._environment().get_template('init_card.md.jinja').name)"
    )
    # -S -I would lose the dependencies: the wheel is put before everything else, and the folder is not a checkout
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert shown == [str(tmp_path / "installed" / "lora_da_hf" / "__init__.py"), "init_card.md.jinja"]
