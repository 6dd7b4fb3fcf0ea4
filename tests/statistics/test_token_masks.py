import pytest
import torch

from lora_da_hf.statistics.token_masks import read_batch_tokens

BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 3, 4], [5, 6, -100, -100]]),
}


@pytest.mark.parametrize("more", [{}, {"shift_labels": torch.tensor([[-100, 3, 4, -100], [6, -100, -100, -100]])}])
def test_labels_count_the_positions_whose_next_token_is_a_label_and_are_shifted_once(more):
    tokens = read_batch_tokens({**BATCH, **more}, shifts_labels=True, token_mask="labels")
    assert [mask.int().tolist() for mask in tokens.masks] == [[[0, 1, 1, 0], [1, 0, 0, 0]]]
    assert tokens.label_counts.tolist() == [2, 1]  # the label in first place predicts nothing
