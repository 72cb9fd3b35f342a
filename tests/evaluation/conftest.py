"""A tiny random policy of the embedded world."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Qwen2VLImageProcessorPil

from srpo_jax.data import scenes
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.policy import Policy, init_policy
from srpo_jax.models.processor import Processor


@pytest.fixture(scope="session")
def policy() -> Policy:
    tokenizer = scenes.build_tokenizer()
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    text = TextConfig(512, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, True, 128)
    vision = VisionConfig(2, 16, 16, 2, 3, 14, 2, 2, 56, (1,), 16)
    config = ModelConfig(text, vision, *(tokenizer.convert_tokens_to_ids(name) for name in names), {})
    images = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56
    )
    made = init_policy(config, Processor(tokenizer, images, config), 0)
    rng = np.random.default_rng(0)
    # Far from the initialisation, where every prompt would be answered alike.
    made.params.update(
        jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32), made.params)
    )
    return made
