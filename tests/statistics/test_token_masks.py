"""Which tokens count, and how many labels each sample has."""

import pytest
import torch

from lora_da_hf.statistics.rows import rows_that_count
from lora_da_hf.statistics.token_masks import BatchTokens, SingleSamplesNeeded, read_batch_tokens


def batch(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


IDS = [[1, 2, 3, 4], [5, 6, 7, 0]]
ATTENTION = [[1, 1, 1, 1], [1, 1, 1, 0]]
LABELS = [[-100, -100, 3, 4], [5, 6, -100, -100]]


@pytest.mark.parametrize("more", [{}, {"shift_labels": [[-100, 3, 4, -100], [6, -100, -100, -100]]}])
def test_labels_count_the_positions_whose_next_token_is_a_label_and_are_shifted_once(more):
    values = batch(input_ids=IDS, attention_mask=ATTENTION, labels=LABELS, **more)
    tokens = read_batch_tokens(values, shifts_labels=True, token_mask="labels")
    assert [mask.int().tolist() for mask in tokens.masks] == [[[0, 1, 1, 0], [1, 0, 0, 0]]]
    assert tokens.label_counts.tolist() == [2, 1]  # the label in first place predicts nothing


@pytest.mark.parametrize("tokens_count", [True, False])
@pytest.mark.parametrize("leading", [(1, 8), (4, 2), (1, 17)])
def test_rows_that_are_not_sample_after_sample_need_single_samples(leading, tokens_count):
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = tokens_count
    tokens = BatchTokens(num_samples=3, label_counts=None, masks=(mask,))
    with pytest.raises(SingleSamplesNeeded, match=r"not those of one sample after another \(\[.*\] in layers\.3\)"):
        rows_that_count(tokens, torch.Size(leading), layer="layers.3")
