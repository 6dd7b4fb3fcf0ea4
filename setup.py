"""What pyproject.toml cannot say: the card templates lie beside the package and are installed inside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lora_da_hf*"]), "lora_da_hf.hub_cards"],
    package_dir={"lora_da_hf.hub_cards": "hub_cards"},
    package_data={"lora_da_hf": ["py.typed"], "lora_da_hf.hub_cards": ["*.jinja"]},
)
