"""Sizes of the released Qwen2.5-VL checkpoints, for work that needs shapes and no weights.

Source: their `config.json` and the reports arXiv 2502.13923 and 2412.15115. The tests hold the numbers of parameters against
those published with the weights.
"""

from __future__ import annotations

from pathlib import Path

from etils import epath

from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.hf import read_config

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied head; intermediate size of the vision tower
_SIZES = {
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29_568, 80, 64, 8, 152_064, False, 3456),
}
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16_384  # of the released image processors; one language token is 28 × 28


def released_config(size: str) -> ModelConfig:
    """The configuration of the released checkpoint of that size: "3B", "7B", "32B" or "72B"."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied, vision_intermediate = _SIZES[size]
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        max_position_embeddings=128_000,
    )
    vision = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=vision_intermediate,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        out_hidden_size=hidden,
    )
    return ModelConfig(text, vision, 151_655, 151_656, 151_652, 151_653)


def config_of(path: str | Path | epath.Path) -> ModelConfig:
    """The configuration in a checkpoint's folder or, where there is none, that of the released checkpoint it is named after.

    Raises:
      FileNotFoundError: neither a folder with a `config.json` nor a released name ("…/Qwen2.5-VL-7B-Instruct").
    """
    folder = epath.Path(path)
    names = {f"Qwen2.5-VL-{size}-Instruct": size for size in _SIZES}
    if (folder / "config.json").is_file() or folder.name not in names:
        return read_config(folder)
    return released_config(names[folder.name])
