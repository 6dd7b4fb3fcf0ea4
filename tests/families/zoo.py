"""Small models of every family that is tested, from transformers' own configs, with samples that each can learn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as tf
from harness import make_lora_config
from peft import get_peft_model
from transformers import Seq2SeqTrainer, Trainer

from lora_da_hf.samples import pad_samples

VOCABULARY = 64
WIDTH = 32
CLASSES = 3
PATCHES = 4
IMAGE_TOKEN = 60
MASK_TOKEN = 61
PADDED = "the loss of two samples is neither the sum nor a mean of theirs"
FRAMES = "the attention mask is of another sequence than the layers' rows"
SPLIT = "cannot be split: the statistics depend on the batch size"
POSITIONS = "some rows are not those of one sample after another"
"""As those of the relative positions, which DeBERTa projects by the layers of the tokens."""
EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
}
ROUTER = "is a parameter and no linear layer"

COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **COMMON,
    **SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ENCODER = {**COMMON, **SIZES, "max_position_embeddings": 64, "initializer_range": 0.2, "num_labels": CLASSES}
BOTH = {
    **COMMON,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
}


def _counting(generator, low=6, high=13):
    """Return tokens that count in steps of 7 modulo 20."""
    start = generator.randrange(20)
    return [3 + (start + 7 * k) % 20 for k in range(generator.randint(low, high))]


def causal_samples(count):
    generator = random.Random(0)
    samples = []
    for _ in range(count):
        ids = _counting(generator)
        prompt = generator.randint(1, 4)
        samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]})
    return samples


def translation_samples(count):
    generator = random.Random(0)
    samples = []
    for _ in range(count):
        ids = _counting(generator)
        labels = [token + 20 for token in ids[: generator.randint(3, 5)]]
        samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return samples


def classification_samples(count):
    generator = random.Random(0)
    rows = {tuple(ids): ids for ids in (_counting(generator, high=21) for _ in range(10 * count))}  # each once
    samples = [{"input_ids": i, "attention_mask": [1] * len(i), "labels": min(len(i) % 4, 2)} for i in rows.values()]
    return samples[:count]


def regression_samples(count):
    return [{**sample, "labels": 1.0 + 0.5 * sample["labels"]} for sample in classification_samples(count)]


def multi_label_samples(count):
    labels = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    return [{**sample, "labels": labels[sample["labels"]]} for sample in classification_samples(count)]


def tagging_samples(count):
    rows = classification_samples(count)
    return [{**row, "labels": [-100] + [min(token % 4, 2) for token in row["input_ids"][1:]]} for row in rows]


def answer_samples(count):
    rows = classification_samples(count)
    return [{**row, "start_positions": (start := row.pop("labels")), "end_positions": start + 2} for row in rows]


def _noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_samples(count):
    return [
        {"pixel_values": _noise(3, 16, 16, seed=number) + number % 2, "labels": number % 2} for number in range(count)
    ]


def choice_samples(count):
    """Make two sequences a sample, as long as the longer of the two."""
    generator = random.Random(0)
    samples = []
    for number in range(count):
        rows = [_counting(generator) for _ in range(2)]
        width = max(map(len, rows))
        samples.append(
            {
                "input_ids": [row + [0] * (width - len(row)) for row in rows],
                "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
                "labels": int(len(rows[0]) < len(rows[1])) if number % 4 else 0,
            }
        )
    return samples


def pad_choices(samples):
    """Pad the sequences of all samples to the longest, ``[B, C, S]``."""
    width = max(len(sample["input_ids"][0]) for sample in samples)
    padded = {
        name: torch.tensor([[row + [0] * (width - len(row)) for row in sample[name]] for sample in samples])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([sample["labels"] for sample in samples])}


def masked_samples(count):
    """Hide every third token, which is to be found again."""
    return [
        {
            **sample,
            "input_ids": [MASK_TOKEN if k % 3 == 1 else token for k, token in enumerate(sample["input_ids"])],
            "labels": [token if k % 3 == 1 else -100 for k, token in enumerate(sample["input_ids"])],
        }
        for sample in causal_samples(count)
    ]


def audio_samples(count):
    return [
        {
            "input_values": _noise(length, seed=number) + number % 2,
            "attention_mask": [1] * length,
            "labels": number % 2,
        }
        for number, length in enumerate(200 + 40 * (number % 6) for number in range(count))
    ]


def pair_samples(count):
    return [
        {
            "input_ids": [*row["input_ids"], 2],
            "attention_mask": [1, *row["attention_mask"]],
            "pixel_values": _noise(3, 16, 16, seed=number),
        }
        for number, row in enumerate(causal_samples(count))
    ]


def pad_pairs(samples):
    return {**pad_samples(samples), "return_loss": True}


def speech_samples(count):
    rows = translation_samples(count)
    return [{"input_features": _noise(8, 32, seed=number), "labels": row["labels"]} for number, row in enumerate(rows)]


def caption_samples(count):
    return [
        {
            "input_ids": [IMAGE_TOKEN] * PATCHES + row["input_ids"],
            "attention_mask": [1] * PATCHES + row["attention_mask"],
            "labels": [-100] * PATCHES + row["labels"],
            "pixel_values": _noise(3, 16, 16, seed=number),
        }
        for number, row in enumerate(causal_samples(count))
    ]


def _vision_config(kind, **overrides):
    return kind(**{**SIZES, "image_size": 16, "patch_size": 8, "initializer_range": 0.2, **overrides})


def _whisper():
    return tf.WhisperConfig(
        **BOTH,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _wav2vec2():
    return tf.Wav2Vec2Config(
        **SIZES,
        vocab_size=VOCABULARY,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(5, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.2,
        num_labels=2,
        classifier_proj_size=16,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        apply_spec_augment=False,
        pad_token_id=0,
    )


def _clip():
    text = {**DECODER, "max_position_embeddings": 16}
    return tf.CLIPConfig(
        text_config=text, vision_config=_vision_config(tf.CLIPVisionConfig).to_dict(), projection_dim=16
    )


def _llava():
    return tf.LlavaConfig(
        text_config=tf.LlamaConfig(**DECODER),
        vision_config=_vision_config(tf.CLIPVisionConfig),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the matrix.

    Attributes:
        model: The class of the model.
        config: Its config, or what makes it.
        samples: Makes samples.
        collate: Makes batches of them.
        trainer: The trainer that people use for it.
        lora: What differs from ``target_modules="all-linear"``.
        kept: Endings of the names of the LoRA layers that keep PEFT's own initialisation, with a part of the reason.
        single: A part of the reason that samples are run one at a time; empty: they are not.
        contrasts: Whether the loss is one of a batch as a whole.
    """

    model: type
    config: Callable
    samples: Callable = causal_samples
    collate: Callable = pad_samples
    trainer: type = Trainer
    lora: dict = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    single: str = ""
    contrasts: bool = False

    def describe(self):
        """Return what the table of support says of it."""
        remarks = [f"`{self.model.__name__}`, `{self.trainer.__name__}`"]
        remarks += [f"`{ending}` keeps PEFT's own initialisation: it {reason}" for ending, reason in self.kept.items()]
        remarks += [f"one sample at a time: {self.single}"] if self.single else []
        remarks += (
            [f"the loss is one of a batch as a whole and {SPLIT}, so autograd's are not compared with"]
            if self.contrasts
            else []
        )
        return "; ".join(remarks)

    @property
    def shifted(self):
        """Tell whether position t predicts label t + 1."""
        return any(part in self.model.__name__ for part in ("CausalLM", "LMHead", "Llava"))

    def make_model(self, *, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model(self.config())

    def adapt(self, **lora):
        """Make a model with a fresh adapter."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(self.make_model(), make_lora_config(**{**self.lora, **lora}))


def _decoder(kind, **overrides):
    return lambda: kind(**{**DECODER, **overrides})


def _encoder(kind, **overrides):
    return lambda: kind(**{**ENCODER, **overrides})


def _deberta(**overrides):
    return _encoder(
        tf.DebertaV2Config,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        position_biased_input=False,
        **overrides,
    )


def send_nothing_to_the_last_expert(_, args, output):
    """Change what a router of Mixtral chose, as a forward hook."""
    logits, weights, chosen = output
    return logits, weights, torch.where(chosen == 3, (chosen.sum(-1, keepdim=True) - 3 + 1) % 3, chosen)


FAMILIES = {
    "Llama": Family(model=tf.LlamaForCausalLM, config=_decoder(tf.LlamaConfig)),
    "Qwen3": Family(model=tf.Qwen3ForCausalLM, config=_decoder(tf.Qwen3Config, head_dim=8)),
    "Gemma 3": Family(
        model=tf.Gemma3ForCausalLM,
        config=_decoder(tf.Gemma3TextConfig, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    ),
    "Mistral": Family(model=tf.MistralForCausalLM, config=_decoder(tf.MistralConfig, sliding_window=8)),
    "Phi": Family(model=tf.PhiForCausalLM, config=_decoder(tf.PhiConfig)),
    "GPT-2 (Conv1D)": Family(
        model=tf.GPT2LMHeadModel,
        config=lambda: tf.GPT2Config(
            **COMMON, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
        ),
        lora={"fan_in_fan_out": True},
    ),
    "GPT-NeoX (fused qkv)": Family(model=tf.GPTNeoXForCausalLM, config=_decoder(tf.GPTNeoXConfig)),
    "Falcon (fused qkv)": Family(
        model=tf.FalconForCausalLM, config=_decoder(tf.FalconConfig, new_decoder_architecture=False, multi_query=True)
    ),
    "OPT": Family(
        model=tf.OPTForCausalLM,
        config=lambda: tf.OPTConfig(
            **COMMON,
            hidden_size=WIDTH,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=WIDTH,
            init_std=0.2,
        ),
    ),
    "Mixtral (experts)": Family(
        model=tf.MixtralForCausalLM,
        config=_decoder(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
        lora=EXPERTS,
        kept={"mlp.gate": ROUTER},
    ),
    "Qwen3-MoE (experts)": Family(
        model=tf.Qwen3MoeForCausalLM,
        config=_decoder(tf.Qwen3MoeConfig, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        lora=EXPERTS,
        kept={"mlp.gate": ROUTER},
    ),
    "GPT-OSS (experts, transposed, with biases)": Family(
        model=tf.GptOssForCausalLM,
        config=_decoder(tf.GptOssConfig, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        lora={**EXPERTS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "T5": Family(
        model=tf.T5ForConditionalGeneration,
        config=lambda: tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
        samples=translation_samples,
        trainer=Seq2SeqTrainer,
    ),
    "BART": Family(
        model=tf.BartForConditionalGeneration,
        config=lambda: tf.BartConfig(
            **BOTH, max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=2
        ),
        samples=translation_samples,
        trainer=Seq2SeqTrainer,
    ),
    "BERT, sequence classification": Family(
        model=tf.BertForSequenceClassification, config=_encoder(tf.BertConfig), samples=classification_samples
    ),
    "BERT, token classification": Family(
        model=tf.BertForTokenClassification, config=_encoder(tf.BertConfig), samples=tagging_samples
    ),
    "BERT, question answering": Family(
        model=tf.BertForQuestionAnswering,
        config=_encoder(tf.BertConfig, num_labels=2),
        samples=answer_samples,
        single=PADDED,
    ),
    "DeBERTa, sequence classification": Family(
        model=tf.DebertaV2ForSequenceClassification,
        config=_deberta(),
        samples=classification_samples,
        single=POSITIONS,
    ),
    "DeBERTa, token classification": Family(
        model=tf.DebertaV2ForTokenClassification, config=_deberta(), samples=tagging_samples, single=POSITIONS
    ),
    "DeBERTa, question answering": Family(
        model=tf.DebertaV2ForQuestionAnswering,
        config=_deberta(num_labels=2),
        samples=answer_samples,
        single=PADDED,
    ),
    "BERT, regression": Family(
        model=tf.BertForSequenceClassification, config=_encoder(tf.BertConfig, num_labels=1), samples=regression_samples
    ),
    "BERT, multi-label": Family(
        model=tf.BertForSequenceClassification, config=_encoder(tf.BertConfig), samples=multi_label_samples
    ),
    "ViT (images)": Family(
        model=tf.ViTForImageClassification,
        config=lambda: _vision_config(tf.ViTConfig, num_labels=2),
        samples=image_samples,
    ),
    "Whisper (audio)": Family(
        model=tf.WhisperForConditionalGeneration, config=_whisper, samples=speech_samples, trainer=Seq2SeqTrainer
    ),
    "LLaVA (images and text)": Family(model=tf.LlavaForConditionalGeneration, config=_llava, samples=caption_samples),
    "BERT, multiple choice": Family(
        model=tf.BertForMultipleChoice,
        config=_encoder(tf.BertConfig, num_labels=1),
        samples=choice_samples,
        collate=pad_choices,
    ),
    "BERT, masked language model": Family(
        model=tf.BertForMaskedLM, config=_encoder(tf.BertConfig), samples=masked_samples
    ),
    "BERT, question answering (`QUESTION_ANS`)": Family(
        model=tf.BertForQuestionAnswering,
        config=_encoder(tf.BertConfig, num_labels=2),
        samples=answer_samples,
        lora={"task_type": "QUESTION_ANS", "target_modules": ["query", "key", "value", "dense"]},
        single=PADDED,
    ),
    "XLM-RoBERTa, token classification (`TOKEN_CLS`)": Family(
        model=tf.XLMRobertaForTokenClassification,
        config=_encoder(tf.XLMRobertaConfig, max_position_embeddings=80),
        samples=tagging_samples,
        lora={"task_type": "TOKEN_CLS", "target_modules": ["query", "key", "value", "dense"]},
    ),
    "Wav2Vec2 (audio, padded)": Family(
        model=tf.Wav2Vec2ForSequenceClassification,
        config=_wav2vec2,
        samples=audio_samples,
        lora={"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]},
        single=FRAMES,
    ),
    "CLIP (images and text, contrastive)": Family(
        model=tf.CLIPModel, config=_clip, samples=pair_samples, collate=pad_pairs, contrasts=True
    ),
}
