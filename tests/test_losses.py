import pytest
from families.zoo import FAMILIES

from lora_da_hf.losses import max_sample_length


@pytest.mark.parametrize(
    ("family", "length"),
    [
        ("Llama", None),  # rotary
        ("GPT-2 (Conv1D)", 64),
        ("BERT, regression", 64),
        ("T5", None),  # relative positions
        ("DeBERTa, sequence classification", None),  # relative ones, in a table of as many rows
        ("XLM-RoBERTa, token classification (`TOKEN_CLS`)", 79),  # from the row behind the padding's on
    ],
)
def test_the_longest_sample_is_what_the_position_embeddings_allow(family, length):
    assert max_sample_length(FAMILIES[family].make_model()) == length
