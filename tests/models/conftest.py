"""Small random Qwen2.5-VL checkpoints, built with transformers in torch and read by this library."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from srpo_jax.models.policy import Policy, load_policy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
# The shape of the family's template: a default system turn, images wherever the content has them.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCAB = 320

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
MQA = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}
MQA_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
# name: (text, vision, tied)
VARIANTS: dict[str, tuple[dict, dict, bool]] = {
    "untied": ({}, {}, False),
    "tied": ({**MQA, "rope_parameters": MQA_ROPE}, {"depth": 2, "fullatt_block_indexes": [], "window_size": 112}, True),
    "full": ({"num_hidden_layers": 1}, {"depth": 4, "fullatt_block_indexes": [0, 3], "window_size": 84}, False),
}


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's special tokens."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["You are a helpful assistant. What is shown in the picture? user system"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=TEMPLATE,
    )


def build_config(tokenizer: Any, text: dict, vision: dict, tied: bool) -> transformers.Qwen2_5_VLConfig:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return transformers.Qwen2_5_VLConfig(
        text_config=copy.deepcopy({**TEXT, **text, **ends}),
        vision_config={**VISION, **vision},
        tie_word_embeddings=tied,
        **ids,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter, biases and norms too, so that each of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                is_norm = "norm" in name or "ln_q" in name
                value.copy_(normal(value.shape, 0.4) + is_norm)
            elif "embed_tokens" in name or "lm_head" in name:
                value.copy_(normal(value.shape, 0.4))
            else:
                value.copy_(normal(value.shape, 1.2 * value[0].numel() ** -0.5))


class TorchProcessor(transformers.Qwen2_5_VLProcessor):
    """The real processor, less its demand for a video processor (which needs torchvision)."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """Lets the video processor be None."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One model twice: in torch, and loaded from the same folder."""

    folder: Path
    torch: transformers.Qwen2_5_VLForConditionalGeneration
    policy: Policy

    def torch_inputs(self, images: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        """What transformers makes of one example, sizes and tokens computed by it alone."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        settings = transformers.Qwen2VLImageProcessorPil.from_pretrained(self.folder)
        processor = TorchProcessor(settings, tokenizer, None, chat_template=tokenizer.chat_template)
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return dict(processor(images=images or None, text=[text], return_tensors="pt"))


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Checkpoint]:
    """Makes the checkpoint of a variant, once per session."""

    @functools.cache
    def make(variant: str) -> Checkpoint:
        text, vision, tied = VARIANTS[variant]
        config = build_config(tokenizer, text, vision, tied)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        randomise(model, seed=len(variant))
        folder = tmp_path_factory.mktemp(variant)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=140 * 140).save_pretrained(folder)
        return Checkpoint(folder, model, load_policy(folder))

    return make


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """Noise of a given width, height and seed."""
    return _picture
