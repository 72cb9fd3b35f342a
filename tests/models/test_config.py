"""Promise: both layouts of `config.json` are read alike, round-trip, and what is not supported is refused by name."""

import copy
import dataclasses
import json

import pytest
import transformers

from srpo_jax.models.config import ModelConfig

# The fields of the released 3B checkpoint's config.json.
RELEASED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_flat_and_nested_layouts_agree():
    flat = ModelConfig.from_hf(RELEASED)
    nested = transformers.Qwen2_5_VLConfig(**copy.deepcopy(RELEASED)).to_dict()
    assert "text_config" in nested
    assert ModelConfig.from_hf(json.loads(json.dumps(nested, default=str))) == flat
    assert flat.text.mrope_section == (16, 24, 24)
    assert flat.text.head_dim == 128
    assert flat.text.tie_word_embeddings
    assert flat.vision.in_channels == 3
    assert flat.vision.window_units == 4


def test_round_trip_keeps_layout_and_unknown_fields():
    config = ModelConfig.from_hf({**RELEASED, "note": "kept"})
    assert config.to_hf()["note"] == "kept"
    assert "text_config" not in config.to_hf()
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert transformers.Qwen2_5_VLConfig(**config.to_hf()).text_config.num_hidden_layers == 36


def test_a_config_made_here_is_read_by_transformers():
    read = ModelConfig.from_hf(RELEASED)
    made = ModelConfig(
        read.text, read.vision, *(RELEASED[f"{n}_token_id"] for n in ("image", "video", "vision_start", "vision_end"))
    )
    assert made == read
    theirs = transformers.Qwen2_5_VLConfig(**made.to_hf())
    assert theirs.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert theirs.tie_word_embeddings
    assert theirs.vision_config.num_heads == 16


def test_a_changed_depth_reaches_every_field():
    nested = transformers.Qwen2_5_VLConfig(**copy.deepcopy(RELEASED)).to_dict()
    config = ModelConfig.from_hf(nested)
    shallow = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=2))
    theirs = transformers.Qwen2_5_VLConfig(**shallow.to_hf())
    assert theirs.text_config.num_hidden_layers == 2
    assert len(theirs.text_config.layer_types) == 2


def test_hashable_and_independent_of_the_source():
    source = copy.deepcopy(RELEASED)
    config = ModelConfig.from_hf(source)
    assert hash(config) == hash(ModelConfig.from_hf({**RELEASED, "note": 1}))
    source["vision_config"]["depth"] = 1
    assert config.to_hf()["vision_config"]["depth"] == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["sliding_attention"] * 36}, "sliding-window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 20]}}, "mrope_section must sum"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [32, 32]}}, "three numbers"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "mrope_interleaved": True}}, "interleaved"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "2048"}, "hidden_size must be a positive number"),
        ({"num_key_value_heads": 3}, "num_kv_heads must divide"),
        ({"vision_config": None}, "vision_config must be an object"),
        ({"vision_config": {**RELEASED["vision_config"], "hidden_act": "quick_gelu"}}, "vision hidden_act"),
        ({"vision_config": {**RELEASED["vision_config"], "out_hidden_size": 3584}}, "out_hidden_size"),
        ({"vision_config": {**RELEASED["vision_config"], "patch_size": [14, 16]}}, "square"),
        ({"vision_config": {**RELEASED["vision_config"], "window_size": 14}}, "window_size"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**RELEASED, **change})
