"""The lower floors need torch alone."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "peft", "datasets", "accelerate", "huggingface_hub")


@pytest.mark.parametrize("module", ["theory.solve", "theory.line_search", "theory.steps", "statistics.collect"])
def test_importing_it_does_not_import_transformers(module):
    code = f"import sys, lora_da_hf.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there_when_asked_for():
    import lora_da_hf

    assert set(lora_da_hf.__all__) <= set(dir(lora_da_hf))
    for name in lora_da_hf.__all__:
        assert getattr(lora_da_hf, name).__name__ == name


def test_a_name_that_is_not_public_is_an_attribute_error():
    import lora_da_hf

    with pytest.raises(AttributeError, match="module 'lora_da_hf' has no attribute 'no_such_name'"):
        lora_da_hf.no_such_name  # noqa: B018
