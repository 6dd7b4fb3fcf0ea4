import contextlib

import pytest
import torch
from harness import adapter_weights, assert_same_tensors, collate, make_learnable_samples

from lora_da_hf.adapters.targets import find_targets
from lora_da_hf.adapters.trial import trial_adapters
from lora_da_hf.adapters.write import write_factors
from lora_da_hf.errors import WriteError
from lora_da_hf.theory.steps import split_factors


def random_bases(targets, rank=4, scale=0.05):
    generator = torch.Generator().manual_seed(0)
    return {
        target.name: (
            torch.randn(rank, target.in_features, generator=generator, dtype=torch.float64) * scale,
            torch.randn(target.out_features, rank, generator=generator, dtype=torch.float64) * scale,
        )
        for target in targets
    }


def logits(model):
    with torch.no_grad():
        return model.eval()(**collate(make_learnable_samples(4))).logits


def write(targets, bases, step):
    for target in targets:
        basis_A, basis_B = (bases[target.name][0][: target.rank], bases[target.name][1][:, : target.rank])
        factors = split_factors(
            basis_A, basis_B, peft_scaling=target.peft_scaling, step_size=step, factor_split="default_norm"
        )
        write_factors(target, *factors)


@pytest.mark.parametrize("value", [float("nan"), 1e39])
def test_what_is_not_finite_in_the_adapters_dtype_is_refused(lora_model, value):
    target = find_targets(lora_model()).targets[0]
    with pytest.raises(WriteError, match=r"lora_B reads back differently from what was written, or is not finite in"):
        write_factors(target, torch.zeros(4, 48), torch.full((48, 4), value, dtype=torch.float64))


def test_a_trial_gives_what_the_written_adapter_gives_and_writes_nothing(lora_model):
    model = lora_model(rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 1})
    targets = find_targets(model).targets
    bases = random_bases(targets)
    before, base = adapter_weights(model), logits(model)
    with trial_adapters(targets, bases) as trial:
        assert torch.equal(logits(model), base)
        trial.step_size = 0.7
        tried = logits(model)
        trial.rank = 1
        tried_smaller = logits(model)
    assert_same_tensors(adapter_weights(model), before)
    assert torch.equal(logits(model), base)
    write(targets, bases, 0.7)
    torch.testing.assert_close(logits(model), tried, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tried, base, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(tried, tried_smaller, rtol=1e-3, atol=1e-3)


def test_a_trial_leaves_no_hook_behind_though_it_fails(lora_model):
    model = lora_model()
    targets = find_targets(model).targets
    with contextlib.suppress(KeyboardInterrupt), trial_adapters(targets, random_bases(targets)):
        assert all(target.base_layer._forward_hooks for target in targets)
        raise KeyboardInterrupt
    assert not any(target.base_layer._forward_hooks for target in targets)
