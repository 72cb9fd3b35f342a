"""A policy: a configuration, a module definition, parameters and the processor that feeds them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from srpo_jax.inputs import Encoded, Inputs, batch_inputs
from srpo_jax.models.config import ModelConfig
from srpo_jax.models.hf import Params, load_params, param_shapes, read_config
from srpo_jax.models.lora import PARTS, LoraConfig, adapted_paths, init_adapters
from srpo_jax.models.peft import base_folder, is_adapter_folder, load_adapters
from srpo_jax.models.processor import Processor
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.models.remote import on_this_machine
from srpo_jax.models.saving import save_params
from srpo_jax.sharding import flatten, param_shardings, unflatten

SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Policy:
    """Everything that is needed to run a model.

    `graphdef` is static and hashable; `nnx.merge(graphdef, params)` gives the module, inside a compiled function.

    Attributes:
      config: sizes of the model.
      graphdef: the module without its parameters.
      params: nested dict of arrays, layers stacked on a leading axis.
      processor: images and text to inputs, ids to text.
    """

    config: ModelConfig
    graphdef: Any
    params: Params = dataclasses.field(repr=False)
    processor: Processor = dataclasses.field(repr=False)

    def encode(self, examples: Iterable[Mapping[str, Any]]) -> Inputs:
        """A batch of prompts, padded to sizes of the bucket ladder.

        Args:
          examples: mappings with `question` and either `image` (one), `images` (several) or neither.

        Returns:
          `Inputs`; batches whose longest prompts fall into the same bucket have the same shapes.

        Raises:
          ValueError: no examples, an unknown field, or a prompt that `Processor.encode` refuses; names the example.
        """
        encoded = [self._encode(number, example) for number, example in enumerate(examples)]
        if not encoded:
            raise ValueError("no examples to encode")
        return pad_batch(encoded, self.config)

    def _encode(self, number: int, example: Mapping[str, Any]) -> Encoded:
        if unknown := example.keys() - {"question", "image", "images"}:
            raise ValueError(
                f"example {number}: unknown field(s) {sorted(unknown)}; it takes question, image or images"
            )
        if "question" not in example or ("image" in example and "images" in example):
            raise ValueError(f"example {number}: give a question, and image or images but not both")
        images = [example["image"]] if example.get("image") is not None else example.get("images") or []
        try:
            return self.processor.encode(images, example["question"])
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error

    def save(self, folder: str | Path, params: Params | None = None, dtype: Any = None) -> None:
        """Writes a folder in Hugging Face's format (see `saving.save_params`).

        Args:
          folder: must not exist yet, or be empty.
          params: in place of its own; adapters and quantised kernels are merged (see `lora.merged`).
          dtype: of the tensors in the file; None keeps that of the parameters.
        """
        save_params(folder, self.config, self.params if params is None else params, self.processor, dtype=dtype)


def load_policy(
    path: str | Path,
    *,
    base: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    quantize: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_image_tokens: int | None = None,
) -> Policy:
    """Reads a checkpoint folder of the Qwen2.5-VL family in Hugging Face's format, or adapters in PEFT's with their base.

    Args:
      path: the folder, or its address, such as gs://bucket/model, of which each process reads what its devices hold.
        Adapters stay apart from their base: they can be trained on, or merged by `Policy.save`.
      base: of adapters, the folder of their base; None takes the one that their config names.
      mesh: where the parameters go, split by the table of `sharding`; None takes the default device.
      dtype: dtype of the parameters; None keeps the file's.
      quantize: "int8" keeps the kernels of the layers in int8 (see `models.quantize`); None does not.
      min_pixels: see `Processor.load`.
      max_pixels: see `Processor.load`.
      max_image_tokens: see `Processor`.

    Raises:
      FileNotFoundError: a part of the checkpoint is missing.
      ValueError: another architecture, parts that do not fit together, or another quantisation.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r}: use 'int8' or None")
    adapted = is_adapter_folder(path)
    folder = base_folder(path, base) if adapted else path
    if base is not None and not adapted:
        raise ValueError(
            f"{path} holds no adapters (adapter_config.json), so it has no base; leave base={str(base)!r} out"
        )
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "max_image_tokens": max_image_tokens}
    with on_this_machine(folder) as files:
        config = read_config(files)
        processor = Processor.load(files, config, **limits)
    shardings = None if mesh is None else param_shardings(param_shapes(config), mesh)
    params = load_params(folder, config, shardings, dtype, int8=quantize == "int8")
    if adapted:
        with on_this_machine(path) as files:
            adapters = unflatten(load_adapters(files, config))
        where = None if mesh is None else param_shardings(adapters, mesh)
        params = unflatten(flatten(params) | flatten(jax.device_put(adapters, where)))
    return Policy(config, graph_definition(config, params), params, processor)


def adapt(policy: Policy, lora: LoraConfig, seed: int, mesh: Mesh | None = None) -> Policy:
    """The policy with fresh adapters, which give the function that it has.

    Args:
      policy: without adapters.
      lora: which ones; of rank 0 for none.
      seed: see `lora.init_adapters`.
      mesh: where they go; None takes the default device.

    Raises:
      ValueError: a target that matches no linear map, or a policy that has adapters.
    """
    if not lora.rank:
        return policy
    if present := adapted_paths(flatten(policy.params)):
        raise ValueError(
            f"the policy has adapters already, of {', '.join(present)}; train these (lora.rank=0), or merge them first"
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), policy.params)
    make = functools.partial(init_adapters, shapes, lora, seed)
    where = None if mesh is None else flatten(param_shardings(unflatten(jax.eval_shape(make)), mesh))
    params = unflatten(flatten(policy.params) | jax.jit(make, out_shardings=where)())
    return dataclasses.replace(policy, graphdef=graph_definition(policy.config, params), params=params)


def init_policy(config: ModelConfig, processor: Processor, seed: int) -> Policy:
    """A policy with random parameters (float32), the same for the same seed."""
    return Policy(config, graph_definition(config), _init_params(config, jax.random.key(seed)), processor)


@functools.partial(jax.jit, static_argnums=0)  # op by op, it takes ten times as long
def _init_params(config: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Qwen2_5_VL(config, nnx.Rngs(key))))


def graph_definition(config: ModelConfig, params: Params | None = None) -> Any:
    """The module's graph definition, without allocating parameters.

    Args:
      config: sizes of the model.
      params: parameters, or shapes of them, whose adapters and quantised kernels the module shall have; None for neither.
    """
    optional = [path for path in flatten(params or {}) if path.rpartition("/")[2] in PARTS]
    return _graph_definition(config, tuple(sorted(optional)))


@functools.cache
def _graph_definition(config: ModelConfig, optional: tuple[str, ...]) -> Any:
    def make() -> Qwen2_5_VL:
        model = Qwen2_5_VL(config, nnx.Rngs(0))
        for path in optional:
            *owner, name = path.split("/")
            setattr(functools.reduce(getattr, owner, model), name, nnx.Param(jnp.zeros(())))  # shapes are the params'
        return model

    return nnx.split(nnx.eval_shape(make))[0]


def forward(policy: Policy, params: Params, inputs: Inputs) -> jax.Array:
    """Logits of the next token. Pure: reads `params`, not those of the policy.

    Returns:
      float[B, T, V] in float32 or wider; rows beyond `inputs.lengths` are meaningless.
    """
    return _forward(policy.graphdef, params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, params: Params, inputs: Inputs) -> jax.Array:
    return nnx.merge(graphdef, params)(inputs)


def bucket(size: int, unit: int = 1) -> int:
    """The smallest size of the ladder 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (times `unit`) that holds `size`."""
    count = max(1, -(-size // unit))
    power = 2 ** math.ceil(math.log2(count))
    return unit * (power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power)


def pad_batch(examples: Sequence[Encoded], config: ModelConfig) -> Inputs:
    """`batch_inputs` with the longest sequence and the most patches rounded up to the bucket ladder."""
    length = bucket(max(SHORTEST_BUCKET, *(len(e.tokens) for e in examples)))
    patches = max((len(e.vision.patches) for e in examples if e.vision is not None), default=0)
    inputs = batch_inputs(examples, length, bucket(patches, config.vision.window_patches) if patches else None)
    return jax.tree.map(jnp.asarray, inputs)
