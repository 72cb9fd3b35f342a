"""Parameters to a folder in Hugging Face's format, the other way of `models.hf`: one file of tensors at a time.

In a job of several processes all call together: each tensor passes through all of them, the lead process writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from srpo_jax import distributed
from srpo_jax.models.config import ModelConfig
from srpo_jax.models.hf import INDEX, WEIGHTS, Params, Source, sources
from srpo_jax.models.lora import merged_dtype, merged_part, plain_paths
from srpo_jax.models.remote import Draft, new_folder
from srpo_jax.sharding import flatten, to_host

if TYPE_CHECKING:
    from srpo_jax.models.processor import Processor


def save_params(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    processor: Processor | None = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained` reads.

    The folder appears complete or not at all (see `remote.new_folder`). The lead process holds one
    file in memory; nobody holds the model, whose adapters and quantised kernels are merged layer by layer (`lora.merged`).

    Args:
      folder: must not exist yet, or be empty; a path, or an address such as gs://bucket/model.
      config: written as `config.json`, with the dtype of the embedding in the file.
      params: nested dict of arrays, wherever they are.
      processor: its tokenizer, chat template and image settings are written too.
      dtype: of the tensors in the file; None keeps that of the parameters.
      max_shard_bytes: larger checkpoints are split into several files.

    Raises:
      FileExistsError: the folder has content.
      ValueError: params that do not fit the config.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    flat = flatten(params)
    _check_params({path: flat[path] for path in plain_paths(flat)}, config)
    table = sources(config)
    shards = _plan_shards({path: merged_dtype(flat, path, dtype).itemsize for path in table}, table, max_shard_bytes)
    if not distributed.is_lead():
        for names in shards:
            for name, paths in names.items():
                _tensor(name, paths, flat, table, dtype)
        distributed.barrier()
        return
    with atomic_folder(folder) as draft:
        _write_tensors(draft, shards, flat, table, dtype)
        partial = draft.path
        write_json(partial / "config.json", _with_dtype(config.to_hf(), str(merged_dtype(flat, "embed", dtype))))
        if processor is not None:
            processor.save(partial)
            stops = list(processor.stop_ids)
            generation = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": processor.pad_id}
            write_json(partial / "generation_config.json", generation)
    distributed.barrier()


def _check_params(flat: Mapping[str, Any], config: ModelConfig) -> None:
    expected = {path: source.param_shape for path, source in sources(config).items()}
    problems = [f"missing: {path}" for path in sorted(expected.keys() - flat.keys())]
    problems += [f"unexpected: {path}" for path in sorted(flat.keys() - expected.keys())]
    for path in sorted(expected.keys() & flat.keys()):
        if flat[path].shape != expected[path]:
            problems.append(f"misshapen: {path} is {flat[path].shape}, the config needs {expected[path]}")
    if problems:
        raise ValueError("params do not fit the config\n  " + "\n  ".join(problems))


@contextmanager
def atomic_folder(folder: str | Path, last: str = "config.json") -> Iterator[Draft]:
    """`remote.new_folder`, with a message where writing fails."""
    try:
        with new_folder(folder, last) as draft:
            yield draft
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: could not be written ({error}); nothing was left behind, free space and retry"
        ) from error


def _write_tensors(
    draft: Draft, shards: list[dict[str, list[str]]], flat: Params, table: Mapping[str, Source], dtype: Any
) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _tensor(name, paths, flat, table, dtype) for name, paths in names.items()}
        save_file(tensors, draft.path / file, {"format": "pt"})
        draft.done(file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(draft.path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(
    itemsizes: Mapping[str, int], table: Mapping[str, Source], max_shard_bytes: int
) -> list[dict[str, list[str]]]:
    """Tensors of each file, with the parameters that each tensor is made of; `itemsizes` in the file, by parameter."""
    owners: dict[str, list[str]] = {}
    for path, source in table.items():
        for name in source.names:
            owners.setdefault(name, []).append(path)
    shards: list[dict[str, list[str]]] = [{}]
    size = 0
    for name, paths in owners.items():
        nbytes = sum(int(np.prod(table[path].matrix)) * itemsizes[path] for path in paths)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = paths
        size += nbytes
    return shards


def _tensor(name: str, paths: list[str], flat: Params, table: Mapping[str, Source], dtype: Any) -> np.ndarray:
    """One tensor of the checkpoint on the host."""
    parts = []
    for path in paths:  # in the order of `Source.part`
        source = table[path]
        value = to_host(merged_part(flat, path, source.names.index(name) if source.stacked else None, dtype))
        parts.append(value.T if source.transposed else value)
    return np.ascontiguousarray(np.concatenate(parts).reshape(table[paths[0]].shape))


def _with_dtype(hf: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the dtype that transformers should load in, under the names it already uses."""
    for section in (hf, hf.get("text_config"), hf.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if section and key in section:
                section[key] = dtype
    if "torch_dtype" not in hf:
        hf["dtype"] = dtype
    return hf


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, keys sorted as Hugging Face's own files have them."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
