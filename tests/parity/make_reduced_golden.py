"""Reduce a folder of golden values to what test_golden.py reads: ``make_reduced_golden.py GOLDEN_FOLDER``.

Products B A are kept as factors of their rank, in float64 as the statistics, so that the solve can be held to 1e-8. The
authors' own factors were computed in float32 and are compared at 5e-2, so they are kept in float16.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "golden"


def factors(product, rank):
    left, singular, right = torch.linalg.svd(product.double(), full_matrices=False)
    left, right = left[:, :rank] * singular[:rank].sqrt(), right[:rank] * singular[:rank].sqrt()[:, None]
    assert (left @ right - product).norm() <= 1e-12 * product.norm()
    return left.contiguous(), right.contiguous()


def in_half(lora_B, lora_A):
    """Bring both factors to one norm, so that nothing underflows, and round them."""
    scale = (lora_A.norm() / lora_B.norm()).sqrt()
    rounded = (lora_B * scale).half(), (lora_A / scale).half()
    product = lora_B @ lora_A
    assert (rounded[0].float() @ rounded[1].float() - product).norm() <= 1e-3 * product.norm()
    return rounded


def main(folder):
    cases = json.loads((folder / "cases.json").read_text())
    exact, upstream = (load_file(folder / f"expected_{name}.safetensors") for name in ("fp64", "upstream_fp32"))
    modules = [key.split("/")[-1] for key in exact if key.startswith("statistics/weight_grad/")]
    statistics, products, authors = {}, {}, {}
    for module in modules:
        statistics[f"weight_grad/{module}"] = exact[f"statistics/weight_grad/{module}"]
        for mask in ("attention", "labels"):
            name = f"{mask}/{module}/output_grad_second_moment_diag"
            statistics[name] = exact[f"statistics/{name}"]
            name = f"{mask}/{module}/input_second_moment"
            moment = exact[f"statistics/{name}"]
            packed = moment[tuple(torch.triu_indices(*moment.shape))]
            same = [k for k, v in statistics.items() if k.startswith(mask) and torch.equal(v, packed)]
            statistics |= {} if same else {name: packed}
        for case, fields in cases.items():
            key = f"{case}/{module}"
            products[f"{key}/left"], products[f"{key}/right"] = factors(exact[f"{key}/lora_BA"], fields["rank"])
            half = in_half(upstream[f"{key}/lora_B"], upstream[f"{key}/lora_A"])
            authors[f"{key}/lora_B"], authors[f"{key}/lora_A"] = half
    HERE.mkdir(exist_ok=True)
    save_file(statistics, HERE / "statistics.safetensors")
    save_file(products, HERE / "products.safetensors")
    save_file(authors, HERE / "authors.safetensors")
    for name in ("cases.json", "samples.json"):
        (HERE / name).write_text(json.dumps(json.loads((folder / name).read_text())) + "\n")
    for name in ("config.json", "model.safetensors"):
        (HERE / "model").mkdir(exist_ok=True)
        shutil.copyfile(folder / "model" / name, HERE / "model" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
