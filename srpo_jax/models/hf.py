"""Parameters of Qwen2.5-VL from a folder in Hugging Face's format: `config.json` and safetensors, never pickle.

One table, `sources`, says which tensors of a checkpoint make up each of our parameters. Our kernels are transposed
([in, out]), layers are stacked, and the fused query-key-value projection of the vision tower is three projections.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from srpo_jax.models.config import ModelConfig
from srpo_jax.models.quantize import is_quantisable, quantise
from srpo_jax.models.remote import is_address, open_tensors
from srpo_jax.sharding import flatten, unflatten

Params = dict[str, Any]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# transformers 4.52 and later also name tensors in this way; the released names are the canonical ones here.
NEW_PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}
_DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32, "F64": jnp.float64}
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint behind one parameter.

    Attributes:
      names: one tensor per stacked layer, or a single one.
      shape: shape of each tensor in the checkpoint.
      stacked: whether the parameter has a leading layer axis.
      transposed: whether the tensor is [out, ...] and the parameter [..., out]; trailing axes are flattened.
      part: which third of the tensor's first axis, for the fused query-key-value projection; None for all of it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    transposed: bool
    part: int | None = None

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of one layer's share of the tensor, trailing axes flattened if transposed."""
        rows = self.shape[0] if self.part is None else self.shape[0] // 3
        return (rows, int(np.prod(self.shape[1:]))) if self.transposed else (rows, *self.shape[1:])

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        shape = self.matrix[::-1] if self.transposed else self.matrix
        return (len(self.names), *shape) if self.stacked else shape


def sources(config: ModelConfig) -> dict[str, Source]:
    """Every parameter of the model, as a path with slashes, and the tensors it comes from."""
    out: dict[str, Source] = {}
    _text_sources(config, out)
    _vision_sources(config, out)
    return out


def _add(
    out: dict[str, Source], path: str, name: str, shape: tuple[int, ...], layers: int | None, **kwargs: Any
) -> None:
    names = (name,) if layers is None else tuple(name.format(i) for i in range(layers))
    out[path] = Source(names, shape, layers is not None, kwargs.pop("transposed", False), **kwargs)


def _add_linear(
    out: dict[str, Source], path: str, name: str, shape: tuple[int, int], layers: int | None, bias: bool, **kwargs: Any
) -> None:
    _add(out, f"{path}/kernel", f"{name}.weight", shape, layers, transposed=True, **kwargs)
    if bias:
        _add(out, f"{path}/bias", f"{name}.bias", shape[:1], layers, **kwargs)


def _text_sources(config: ModelConfig, out: dict[str, Source]) -> None:
    text = config.text
    width, depth = text.hidden_size, text.num_layers
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    _add(out, "embed", EMBEDDING, (text.vocab_size, width), None)
    if not text.tie_word_embeddings:
        _add(out, "head", HEAD, (text.vocab_size, width), None)
    _add(out, "norm/scale", "model.norm.weight", (width,), None)
    layer = "model.layers.{}"
    _add(out, "layers/attention_norm/scale", f"{layer}.input_layernorm.weight", (width,), depth)
    _add(out, "layers/mlp_norm/scale", f"{layer}.post_attention_layernorm.weight", (width,), depth)
    for path, size in (("q", queries), ("k", keys), ("v", keys)):
        _add_linear(out, f"layers/attention/{path}", f"{layer}.self_attn.{path}_proj", (size, width), depth, True)
    _add_linear(out, "layers/attention/out", f"{layer}.self_attn.o_proj", (width, queries), depth, False)
    _mlp_sources(out, "layers/mlp", f"{layer}.mlp", width, text.intermediate_size, depth, False)


def _vision_sources(config: ModelConfig, out: dict[str, Source]) -> None:
    vision = config.vision
    width, depth = vision.hidden_size, vision.depth
    side = vision.patch_size
    kernel = (width, vision.in_channels, vision.temporal_patch_size, side, side)
    _add(out, "vision/patch_embed/kernel", "visual.patch_embed.proj.weight", kernel, None, transposed=True)
    block = "visual.blocks.{}"
    _add(out, "vision/blocks/attention_norm/scale", f"{block}.norm1.weight", (width,), depth)
    _add(out, "vision/blocks/mlp_norm/scale", f"{block}.norm2.weight", (width,), depth)
    for part, path in enumerate("qkv"):
        name, shape = f"{block}.attn.qkv", (3 * width, width)
        _add_linear(out, f"vision/blocks/attention/{path}", name, shape, depth, True, part=part)
    _add_linear(out, "vision/blocks/attention/out", f"{block}.attn.proj", (width, width), depth, True)
    _mlp_sources(out, "vision/blocks/mlp", f"{block}.mlp", width, vision.intermediate_size, depth, True)
    joined = width * vision.merge_unit
    _add(out, "vision/merger/norm/scale", "visual.merger.ln_q.weight", (width,), None)
    _add_linear(out, "vision/merger/up", "visual.merger.mlp.0", (joined, joined), None, True)
    _add_linear(out, "vision/merger/down", "visual.merger.mlp.2", (vision.out_hidden_size, joined), None, True)


def _mlp_sources(out: dict[str, Source], path: str, name: str, width: int, hidden: int, depth: int, bias: bool) -> None:
    _add_linear(out, f"{path}/gate", f"{name}.gate_proj", (hidden, width), depth, bias)
    _add_linear(out, f"{path}/up", f"{name}.up_proj", (hidden, width), depth, bias)
    _add_linear(out, f"{path}/down", f"{name}.down_proj", (width, hidden), depth, bias)


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The params tree as `jax.ShapeDtypeStruct`s, for shardings and compilation ahead of time."""
    return unflatten({path: jax.ShapeDtypeStruct(s.param_shape, dtype) for path, s in sources(config).items()})


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration in a folder's `config.json`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: invalid JSON, another architecture, an unsupported setting.
    """
    path = epath.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder in Hugging Face's format has one")
    content = read_json(path)
    try:
        return ModelConfig.from_hf(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_params(
    folder: str | Path, config: ModelConfig, shardings: Any = None, dtype: Any = None, *, int8: bool = False
) -> Params:
    """Reads a checkpoint; each device gets its own slices straight from the files.

    Args:
      folder: path or address of what holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      config: the sizes to expect, usually `read_config(folder)`.
      shardings: a tree like the params, one `jax.sharding.Sharding` for all, or None for the default device.
      dtype: dtype of all parameters; None keeps the file's.
      int8: quantise the kernels of the layers (see `models.quantize`), each as soon as it is read.

    Returns:
      Nested dict of arrays.

    Raises:
      FileNotFoundError: no safetensors, or a shard is missing.
      ValueError: an unreadable file, or tensors missing, unexpected or misshapen (all named in one message).
    """
    table = sources(config)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    per_param = flatten(shardings) if isinstance(shardings, Mapping) else dict.fromkeys(table, shardings)
    tensors = _open_tensors(epath.Path(folder))
    _check(tensors, config, folder)
    flat: Params = {}
    for path, source in table.items():
        kinds = [_DTYPES[tensors[name].get_dtype()] for name in source.names]
        kind = jnp.dtype(dtype) if dtype is not None else jnp.result_type(*kinds)
        read = _reader(source, tensors, kind)
        value = jax.make_array_from_callback(source.param_shape, per_param[path], read, dtype=kind)
        flat |= quantise(path, value) if int8 and is_quantisable(path) else {path: value}
    return unflatten(flat)


def _reader(source: Source, tensors: Mapping[str, Any], dtype: jnp.dtype) -> Callable[[Any], np.ndarray]:
    """A function from an index into the parameter to its values, which reads no more than they need."""

    def read(index: Index) -> np.ndarray:
        layers = index[0] if source.stacked else slice(None)
        inner = index[1:] if source.stacked else index
        parts = [_read_one(source, tensors[name], inner, dtype) for name in source.names[layers]]
        return np.stack(parts) if source.stacked else parts[0]

    return read


def _read_one(source: Source, tensor: Any, index: Index, dtype: jnp.dtype) -> np.ndarray:
    index = index[::-1] if source.transposed else index
    rows = range(source.matrix[0])[index[0]]
    offset = (source.part or 0) * source.matrix[0]
    first = slice(rows.start + offset, rows.stop + offset)
    if len(source.shape) == len(source.matrix):
        values = tensor[(first, *index[1:])]
    else:  # the patch embedding, a convolution kernel whose trailing axes are flattened
        values = tensor[first].reshape(len(rows), -1)[:, index[1]]
    return np.ascontiguousarray((values.T if source.transposed else values).astype(dtype))


def _open_tensors(folder: epath.Path) -> dict[str, Any]:
    """Lazy slices of every tensor of a checkpoint, under canonical names."""
    tensors: dict[str, Any] = {}
    for path in _weight_files(folder):
        for name, tensor in _slices(path).items():
            canonical = canonical_name(name)
            if canonical in tensors:
                raise ValueError(f"{path}: tensor {name} occurs twice in the checkpoint")
            tensors[canonical] = tensor
    return tensors


def _slices(path: epath.Path) -> dict[str, Any]:
    """The tensors of a file, none of them read."""
    if is_address(path):
        return dict(open_tensors(path, _DTYPES))
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def canonical_name(name: str) -> str:
    """The released name of a tensor, whichever prefix it was saved with."""
    for new, released in NEW_PREFIXES.items():
        if name.startswith(new):
            return released + name[len(new) :]
    return name


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no {WEIGHTS} and no {INDEX}; convert other formats to safetensors with transformers"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map; fetch the file again")
    files = sorted(set(map(str, weight_map.values())))
    if strange := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{index}: weight_map leaves the folder: {strange}")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: shards named by {INDEX} are missing: {missing}; fetch them again")
    return [folder / name for name in files]


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _check(tensors: Mapping[str, Any], config: ModelConfig, folder: str | Path) -> None:
    """Names everything that keeps a checkpoint from fitting the configuration, in one error."""
    expected = {name: source.shape for source in sources(config).values() for name in source.names}
    optional = {HEAD} if config.text.tie_word_embeddings else set()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append("missing: " + ", ".join(missing))
    if unexpected := sorted(tensors.keys() - expected.keys() - optional):
        problems.append("unexpected: " + ", ".join(unexpected))
    for name in sorted(expected.keys() & tensors.keys()):
        shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != expected[name]:
            problems.append(f"misshapen: {name} is {shape}, the config needs {expected[name]}")
        elif kind not in _DTYPES:
            problems.append(f"dtype: {name} is {kind}, only {', '.join(_DTYPES)} are read (quantised weights are not)")
    if not problems and optional & tensors.keys() and not _equal(tensors[HEAD], tensors[EMBEDDING]):
        problems.append(f"{HEAD} differs from {EMBEDDING} although tie_word_embeddings is true; set it to false")
    if problems:
        raise ValueError(f"{folder}: the checkpoint does not fit its config\n  " + "\n  ".join(problems))


def _equal(a: Any, b: Any, rows: int = 4096) -> bool:
    size = a.get_shape()[0]
    if a.get_shape() != b.get_shape():
        return False
    starts = range(0, size, rows)
    return all(np.array_equal(a[i : min(i + rows, size)], b[i : min(i + rows, size)]) for i in starts)
