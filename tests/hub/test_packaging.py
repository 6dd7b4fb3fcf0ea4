"""What is published passes the index's checks, and works where nothing but it and what it asks for is installed."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from walkthrough import blocks_of_readme, run_steps, serve_what_the_readme_names

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheel(tmp_path):
    """Build sdist and wheel, let the index's own checks look at them, and return the wheel."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "outputs", "tests")
    source = shutil.copytree(REPOSITORY, tmp_path / "source", ignore=ignored)
    run = [sys.executable, "-m"]
    subprocess.run([*run, "build", "--no-isolation", "--outdir", tmp_path / "dist"], cwd=source, check=True)
    wheel, sdist = sorted((tmp_path / "dist").iterdir())
    subprocess.run([*run, "twine", "check", "--strict", wheel, sdist], check=True)
    assert (wheel.suffix, sdist.name.endswith(".tar.gz")) == (".whl", True)
    return wheel


def link_requirements(distribution, extras, site, done):
    """Link into an environment what is installed here of a distribution's requirements, and of theirs."""
    for text in distribution.requires or []:
        asked = Requirement(text)
        wanted = asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if not wanted or (asked.name, *asked.extras) in done:
            continue
        done.add((asked.name, *asked.extras))
        found = importlib.metadata.distribution(asked.name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        link_requirements(found, asked.extras, site, done)


@pytest.mark.slow
def test_the_wheel_alone_runs_the_readme_and_shares(wheel, hub, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    python, program = (tmp_path / "venv" / "bin" / name for name in ("python", "lora-da"))
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    packages = {path.parent.relative_to(REPOSITORY) for path in REPOSITORY.glob("lora_da_hf/**/__init__.py")}
    assert all((site / package / "__init__.py").is_file() for package in packages)
    installed = importlib.metadata.PathDistribution(next(site.glob("lora_da_hf-*.dist-info")))
    link_requirements(installed, (), site, set())
    assert not (site / "trl").exists()

    serve_what_the_readme_names(hub, tmp_path)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice"}
    steps = blocks_of_readme(REPOSITORY / "README.md")
    steps = [steps[0], *(step for step in steps if step[0] == "lora-da")]
    assert [words[0] for _, words in steps[1:]] == ["init", "push"]
    shown = run_steps(steps, tmp_path, replace={"your-name": "alice"}, environment=environment, python=python)
    assert "LoRA-DA: held-out loss" in shown
    pulled = subprocess.run(
        [program, "pull", "alice/my-init", "--quiet"],
        env={**os.environ, **environment, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "other home")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (Path(pulled.stdout.strip()) / "lora_da_manifest.json").is_file()
