"""Rows of an image that are as many as the tokens of a padded text: no mask of the text is taken for theirs."""

import random

import pytest
import torch
import transformers as tf
from harness import assert_updates_equal, initialize, make_lora_config, written_updates
from peft import get_peft_model

from lora_da_hf.samples import pad_samples

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IMAGE, START = 60, 61


def vision_encoder_decoder():
    encoder = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
    )
    decoder = tf.BertConfig(
        **{k: v for k, v in TEXT.items() if "key_value" not in k}, is_decoder=True, add_cross_attention=True
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config)


def captions(count):
    """Make samples of one image, of five rows, and a text of three to five tokens."""
    generator = random.Random(0)
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lengths = [3 + k % 3 for k in range(count)]
    return [
        {"pixel_values": i, "labels": generator.choices(range(3, 60), k=n)}
        for i, n in zip(images, lengths, strict=True)
    ]


def qwen3_vl():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    return tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**TEXT, **MROPE, "head_dim": 8},
            vision_config={
                **vision,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
                "initializer_range": 0.2,
            },
            image_token_id=IMAGE,
            video_token_id=62,
            vision_start_token_id=START,
            vision_end_token_id=63,
        )
    )


def pictured(count):
    """Make samples of one image, of 16 patches and four tokens, and a text: 11 to 16 tokens together."""
    generator = random.Random(0)
    samples = []
    for number in range(count):
        text = generator.choices(range(3, 60), k=6 + (0, 1, 2, 3, 4, 0, 1, 5)[number % 8])
        ids = [START, IMAGE, IMAGE, IMAGE, IMAGE, *text]
        pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(number))
        samples.append({"input_ids": ids, "labels": [-100] * 5 + text, "pixel_values": pixels})
    return samples


def join_images(samples):
    texts = [{name: value for name, value in sample.items() if name != "pixel_values"} for sample in samples]
    batch = pad_samples(texts)
    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    kinds = (batch["input_ids"] == IMAGE).int()
    return {
        **batch,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(samples)),
        "mm_token_type_ids": kinds,
    }


CASES = {
    "VisionEncoderDecoder": (vision_encoder_decoder, captions, pad_samples, ["query", "key", "value"]),
    "Qwen3-VL": (qwen3_vl, pictured, join_images, ["q_proj", "v_proj", "qkv", "attn.proj", "linear_fc1", "linear_fc2"]),
}


def padded(sample, length):
    """Pad a sample's text to a fixed length, as many tokenisers do."""
    missing = length - len(sample["labels"])
    text = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: [*value, *[text[name]] * missing] if name in text else value for name, value in sample.items()}


@pytest.mark.parametrize("case", CASES)
def test_adapters_depend_neither_on_the_batch_size_nor_on_the_length_that_texts_are_padded_to(case):
    make, make_samples, collate, names = CASES[case]
    samples = make_samples(24)
    if "input_ids" in samples[0]:
        samples = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
    longest = max(len(sample["labels"]) for sample in samples)
    found = []
    for size, data in ((1, samples), (4, samples), (4, [padded(sample, longest) for sample in samples])):
        torch.manual_seed(0)
        model = get_peft_model(make(), make_lora_config(target_modules=names))
        settings = {"num_samples": 16, "step_size": 0.1, "search_samples": 0, "batch_size": size}
        report = initialize(model, data, collator=collate, **settings)
        assert report.batch_size == size, report.notes
        assert len(report.layers) > 4
        found.append(written_updates(model))
    for other in found[1:]:
        assert_updates_equal(other, found[0], 2e-4)
