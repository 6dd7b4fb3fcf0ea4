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


def masks(tokens):
    return [mask.int().tolist() for mask in tokens.masks]


def test_labels_count_the_positions_whose_next_token_is_a_label():
    tokens = read_batch_tokens(
        batch(input_ids=IDS, attention_mask=ATTENTION, labels=LABELS), shifts_labels=True, token_mask="labels"
    )
    assert masks(tokens) == [[[0, 1, 1, 0], [1, 0, 0, 0]]]
    assert tokens.label_counts.tolist() == [2, 1]  # the label in first place predicts nothing


def test_labels_that_the_collator_shifted_are_not_shifted_again():
    shifted = [[-100, 3, 4, -100], [6, -100, -100, -100]]
    tokens = read_batch_tokens(
        batch(input_ids=IDS, labels=LABELS, shift_labels=shifted), shifts_labels=True, token_mask="labels"
    )
    assert masks(tokens) == [[[0, 1, 1, 0], [1, 0, 0, 0]]]


@pytest.mark.parametrize("tokens_count", [True, False])
@pytest.mark.parametrize("leading", [(1, 8), (4, 2), (1, 17)])
def test_rows_that_are_not_sample_after_sample_need_single_samples(leading, tokens_count):
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = tokens_count
    tokens = BatchTokens(num_samples=3, label_counts=None, masks=(mask,))
    with pytest.raises(SingleSamplesNeeded, match=r"not those of one sample after another \(\[.*\] in layers\.3\)"):
        rows_that_count(tokens, torch.Size(leading), layer="layers.3")


def test_as_many_rows_as_tokens_in_another_order_are_not_masked_as_tokens():
    mask = torch.tensor([[True, False, True, True], [True, True, True, True]])
    tokens = BatchTokens(num_samples=2, label_counts=None, masks=(mask,))
    with pytest.raises(SingleSamplesNeeded, match="not those of one sample after another"):
        rows_that_count(tokens, torch.Size([1, 8]), layer="a")
    with pytest.raises(SingleSamplesNeeded, match="do not match the token mask"):
        rows_that_count(tokens, torch.Size([4, 2]), layer="a")


def test_of_a_single_sample_rows_that_match_no_mask_count():
    mask = torch.tensor([[True, True, False]])
    tokens = BatchTokens(num_samples=1, label_counts=None, masks=(mask,))
    assert rows_that_count(tokens, torch.Size([1, 3]), layer="a").tolist() == [0, 1]
    assert rows_that_count(tokens, torch.Size([3, 1]), layer="a").tolist() == [0, 1]
    assert rows_that_count(tokens, torch.Size([1, 16]), layer="a") is None
    unlabelled = BatchTokens(num_samples=1, label_counts=torch.tensor([0]), masks=(mask,))
    assert rows_that_count(unlabelled, torch.Size([1, 16]), layer="a").tolist() == []


@pytest.mark.parametrize("num_samples", [1, 2])
def test_rows_that_match_two_sequences_are_refused_if_their_masks_differ(num_samples):
    first, second = torch.tensor([[True, False], [True, True]]), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(
        SingleSamplesNeeded, match=r"rows of layers\.3, \[2, 2\], could be those of either of the model's"
    ):
        tokens = BatchTokens(num_samples=num_samples, label_counts=None, masks=(first, second))
        rows_that_count(tokens, torch.Size([2, 2]), layer="layers.3")
    alike = BatchTokens(num_samples=num_samples, label_counts=None, masks=(first, first.clone()))
    assert rows_that_count(alike, torch.Size([2, 2]), layer="a").tolist() == [0, 2, 3]


def test_sequences_to_choose_from_are_rows_of_their_own():
    chosen = {"input_ids": [IDS, IDS, IDS], "attention_mask": [ATTENTION] * 3, "labels": [1, -100, 0]}
    tokens = read_batch_tokens(batch(**chosen), shifts_labels=False)
    none = [[0] * 4] * 2
    assert masks(tokens) == [[*ATTENTION, *none, *ATTENTION]]
    assert (tokens.num_samples, tokens.num_labelled) == (3, 2)
    assert rows_that_count(tokens, torch.Size([6, 4]), layer="q").tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        16,
        17,
        18,
        19,
        20,
        21,
        22,
    ]
    assert rows_that_count(tokens, torch.Size([6]), layer="pooler").tolist() == [0, 1, 4, 5]
    del chosen["attention_mask"]
    assert read_batch_tokens(batch(**chosen), shifts_labels=False).masks[0].shape == (6, 4)


@pytest.mark.parametrize("attention", [[[1] * 6, [1] * 6], [[1] * 6, [1] * 4 + [0] * 2]])
def test_frames_made_of_padded_audio_cannot_be_told(attention):
    speech = {"input_values": [[0.5] * 6] * 2, "labels": [0, 1]}
    tokens = read_batch_tokens(batch(**speech, attention_mask=attention), shifts_labels=False)
    if attention[0] == attention[1]:
        assert rows_that_count(tokens, torch.Size([2, 3]), layer="q") is None
    else:
        with pytest.raises(
            SingleSamplesNeeded, match="the attention mask is of another sequence than the layers' rows"
        ):
            rows_that_count(tokens, torch.Size([2, 3]), layer="q")
