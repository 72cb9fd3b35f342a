"""The static configuration of Qwen2.5-VL, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from srpo_jax.inputs import MERGE

MODEL_TYPE = "qwen2_5_vl"


# Where each field stands in Hugging Face's text and vision sections.
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
_VISION_KEYS = {
    "depth": "depth",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_heads",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "out_hidden_size": "out_hidden_size",
}
# The released vision sections name two fields otherwise, or leave to the defaults what never varied.
_VISION_ALIASES = {"in_channels": "in_chans", "num_heads": "num_attention_heads", "depth": "num_hidden_layers"}
_VISION_DEFAULTS = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "patch_size": 14}
_TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text decoder.

    Attributes:
      head_dim: width of one attention head, hidden_size / num_heads.
      mrope_section: how many rotary frequencies (of head_dim / 2) turn with time, height and width.
      tie_word_embeddings: whether the log-prob head is the transposed embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        _require(self.num_heads * self.head_dim == self.hidden_size, "hidden_size must be num_heads * head_dim", self)
        _require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads", self)
        _require(len(self.mrope_section) == 3, "mrope_section needs three numbers: time, height, width", self)
        _require(2 * sum(self.mrope_section) == self.head_dim, "mrope_section must sum to head_dim / 2", self)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower.

    Attributes:
      patch_size: side of a square patch in pixels.
      temporal_patch_size: frames per patch; a still image is repeated to fill it.
      spatial_merge_size: side, in patches, of the square that becomes one language token.
      window_size: side of an attention window in pixels.
      fullatt_block_indexes: layers that attend within the whole image; the others within windows.
      out_hidden_size: width of the features, that of the text decoder.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int

    def __post_init__(self) -> None:
        _require(self.hidden_size % (4 * self.num_heads) == 0, "hidden_size must be a multiple of 4 * num_heads", self)
        _require(self.merge_unit == MERGE, "spatial_merge_size must be 2", self)
        _require(self.window_units >= 1, "window_size must hold at least one merge unit", self)

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that merge into one feature."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Side of an attention window in merge units (rounded down, as the released model does)."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Patches in one full attention window."""
        return self.window_units**2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen2.5-VL. Hashable, so it can be a static argument; `hf` takes no part in equality or hash.

    Attributes:
      hf: the `config.json` it was read from, so that fields this library does not use survive an export.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    hf: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"config: vision out_hidden_size {self.vision.out_hidden_size} differs from text hidden_size "
                f"{self.text.hidden_size}; image features could not stand in for token embeddings"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a decoded `config.json`: the released flat layout or the nested one with `text_config`.

        Raises:
          ValueError: another architecture, a missing field, or a setting this implementation lacks.
        """
        if hf.get("model_type") != MODEL_TYPE:
            raise ValueError(f"config: model_type is {hf.get('model_type')!r}; only {MODEL_TYPE!r} is supported")
        nested = hf.get("text_config")
        text = hf if nested is None else nested
        sections = {"text_config": text, "vision_config": hf.get("vision_config")}
        wrong = [name for name, section in sections.items() if not isinstance(section, Mapping)]
        if wrong:
            raise ValueError(f"config: {' and '.join(wrong)} must be an object")
        # Saves of transformers 4.52 to 4.57 put the tying flag into the text section; either one counts there.
        tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return cls(
            text=_read_text(text, tied),
            vision=_read_vision(hf["vision_config"]),
            hf=copy.deepcopy(dict(hf)),
            **{key: int(hf.get(key, default)) for key, default in _TOKEN_IDS.items()},
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers reads, in the layout of `hf` (nested if there is none)."""
        out = copy.deepcopy(dict(self.hf))
        if not out:
            out = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": {}, "vision_config": {}}
            out["text_config"]["tie_word_embeddings"] = self.text.tie_word_embeddings  # where transformers 4 looks
        nested = out.get("text_config") is not None
        text = out["text_config"] if nested else out
        out["model_type"] = MODEL_TYPE
        out["tie_word_embeddings"] = self.text.tie_word_embeddings
        if nested:
            text["model_type"] = f"{MODEL_TYPE}_text"
            if "tie_word_embeddings" in text:
                text["tie_word_embeddings"] = self.text.tie_word_embeddings
        text.update({key: getattr(self.text, field) for field, key in _TEXT_KEYS.items()})
        text.update(_write_rope(self.text, text))
        if text.get("layer_types"):
            text["layer_types"] = ["full_attention"] * self.text.num_layers
        if text.get("head_dim"):
            text["head_dim"] = self.text.head_dim
        out["vision_config"].update({key: getattr(self.vision, field) for field, key in _VISION_KEYS.items()})
        out["vision_config"]["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        if nested:
            out["vision_config"]["model_type"] = f"{MODEL_TYPE}_vision"
        out.update({key: getattr(self, key) for key in _TOKEN_IDS})
        return out


def _require(condition: bool, rule: str, config: TextConfig | VisionConfig) -> None:
    if not condition:
        raise ValueError(f"config: {rule}; got {config}")


def _read(section: Mapping[str, Any], key: str, where: str, default: Any = None) -> Any:
    value = section.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config: {where}.{key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"config: {where}.{key} must be a positive number, got {value!r}")
    return value


def _read_text(section: Mapping[str, Any], tied: bool) -> TextConfig:
    if section.get("use_sliding_window") or "sliding_attention" in (section.get("layer_types") or ()):
        raise ValueError("config: sliding-window attention is not supported; set use_sliding_window to false")
    if section.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config: text hidden_act {section['hidden_act']!r} is not supported, only 'silu'")
    if section.get("attention_dropout"):
        raise ValueError("config: attention_dropout must be 0; dropout would change the policy's log-probs")
    defaults = {"num_kv_heads": section.get("num_attention_heads")}
    values = {
        field: _read(section, key, "text_config", defaults.get(field))
        for field, key in _TEXT_KEYS.items()
        if field != "num_heads"
    }
    heads = _read(section, "num_attention_heads", "text_config")
    head_dim = section.get("head_dim") or values["hidden_size"] // heads
    theta, mrope = _read_rope(section, head_dim)
    return TextConfig(
        **values, num_heads=heads, head_dim=head_dim, rope_theta=theta, mrope_section=mrope, tie_word_embeddings=tied
    )


def _read_rope(section: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[int, ...]]:
    """The rotary base and the M-RoPE sections, from `rope_scaling` (released) or `rope_parameters` (transformers 5)."""
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    kinds = {rope[key] for key in ("type", "rope_type") if rope.get(key) is not None}
    if kinds - {"mrope", "default"}:
        raise ValueError(f"config: rope type {sorted(kinds)} is not supported, only 'mrope' and 'default'")
    if rope.get("partial_rotary_factor", 1) != 1 or rope.get("mrope_interleaved"):
        raise ValueError("config: partial or interleaved rotary embeddings are not supported")
    theta = float(rope.get("rope_theta") or section.get("rope_theta") or 1e6)
    mrope = rope.get("mrope_section")
    if mrope is None:
        if head_dim != 128:
            raise ValueError("config: mrope_section is missing and has no default for this head_dim")
        mrope = (16, 24, 24)
    return theta, tuple(int(n) for n in mrope)


def _write_rope(text: TextConfig, section: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields, under the name that `section` already uses."""
    if section.get("rope_scaling") is not None:
        scaling = {**section["rope_scaling"], "mrope_section": list(text.mrope_section)}
        return {"rope_scaling": scaling, "rope_theta": text.rope_theta}
    old = section.get("rope_parameters") or {"rope_type": "default"}
    return {"rope_parameters": {**old, "rope_theta": text.rope_theta, "mrope_section": list(text.mrope_section)}}


def _read_vision(section: Mapping[str, Any]) -> VisionConfig:
    if section.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config: vision hidden_act {section['hidden_act']!r} is not supported, only 'silu'")
    rope = section.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default") or rope.get("rope_theta", 1e4) != 1e4:
        raise ValueError(f"config: vision rope_parameters {dict(rope)} are not supported, only axial with base 10000")
    values = {}
    for field, key in _VISION_KEYS.items():
        default = section.get(_VISION_ALIASES.get(field, ""), _VISION_DEFAULTS.get(field))
        values[field] = _read({key: _side(section.get(key), key)}, key, "vision_config", default)
    full = section.get("fullatt_block_indexes", (7, 15, 23, 31))
    return VisionConfig(**values, fullatt_block_indexes=tuple(sorted(int(i) for i in full)))


def _side(value: Any, key: str) -> Any:
    """A size that newer configs may write as a pair of equal numbers."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"config: vision_config.{key} must be square, got {value!r}")
    return value[0]
