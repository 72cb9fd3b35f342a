"""Adapters from and to a folder in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, never pickle.

PEFT keeps one pair of factors per module and layer, transposed: `lora_A` [rank, in] and `lora_B` [out, rank]. Where a module
is several of our linear maps (the fused query-key-value projection of the vision tower), reading gives each of them the
whole `lora_A` and its rows of `lora_B`; writing puts their factors side by side, so the rank there is the sum of theirs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from srpo_jax import distributed
from srpo_jax.models.config import ModelConfig
from srpo_jax.models.hf import NEW_PREFIXES, Source, canonical_name, read_json, sources
from srpo_jax.models.lora import UNADAPTED, Params, adapted_paths
from srpo_jax.models.saving import atomic_folder, write_json
from srpo_jax.sharding import flatten, to_host

ADAPTER = ("lora_a", "lora_b", "lora_scale")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Settings that change what an adapter computes, and the values under which it is the plain one that is read here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # Other ways of initialising move the base's weights, so that the adapter does not fit the base it names.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class Factors(NamedTuple):
    """An adapter of one linear map in one layer: a float[in, rank], b float[rank, out], y += scale * (x @ a) @ b."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def is_adapter_folder(path: str | Path) -> bool:
    """Whether `path` holds adapters in PEFT's format."""
    return (epath.Path(path) / CONFIG).is_file()


def base_folder(path: str | Path, base: str | Path | None = None) -> epath.Path:
    """The folder of the model under the adapters in `path`: `base` if given, else the one that their config names.

    Raises:
      ValueError: the config names none, or one that is not on this machine.
    """
    if base is not None:
        return epath.Path(base)
    named = read_json(epath.Path(path) / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not epath.Path(named).is_dir():
        raise ValueError(
            f"{epath.Path(path) / CONFIG}: base_model_name_or_path is {named!r}, which is no folder here; give the "
            "base's folder (base=FOLDER, or --config.policy.base=FOLDER)"
        )
    return epath.Path(named)


def load_adapters(folder: str | Path, config: ModelConfig) -> Params:
    """Reads adapters; float32 numpy arrays by path, to stand beside the parameters of a base of that `config`.

    Layers that have no adapter get one of zeros; ranks that differ between layers are filled up with zeros.

    Raises:
      FileNotFoundError: no safetensors.
      ValueError: not the adapters of such a model, or of a kind that is not LoRA pure and simple; names what it is.
    """
    folder = Path(folder)
    settings = read_json(folder / CONFIG)
    _check_settings(settings, folder / CONFIG)
    modules = _read_modules(folder)
    owners = _owners(config)
    found: dict[str, dict[int, Factors]] = {}
    for name, (a, b) in modules.items():
        canonical = canonical_name(f"{name}.weight")
        if canonical not in owners:
            raise ValueError(f"{folder / WEIGHTS}: {name} is no linear map of this model that can have an adapter")
        shape = owners[canonical][0][2].shape
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise ValueError(f"{folder / WEIGHTS}: lora_A {a.shape} and lora_B {b.shape} of {name} do not fit {shape}")
        scale = _scale(settings, name, a.shape[0], folder / CONFIG)
        for path, layer, source in owners[canonical]:
            rows = source.matrix[0]
            part = (source.part or 0) * rows
            found.setdefault(path, {})[layer] = Factors(a.T, b[part : part + rows].T, scale)
    table = sources(config)
    return {name: x for path, layers in found.items() for name, x in _stack(path, layers, table).items()}


def _check_settings(settings: Mapping[str, Any], where: Path) -> None:
    kind = settings.get("peft_type")
    wrong = [] if kind == "LORA" else [f"peft_type={kind!r}"]
    wrong += [f"{k}={settings[k]!r}" for k, plain in _PLAIN.items() if k in settings and settings[k] not in plain]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} is not supported; merge the adapter into its base with PEFT")
    if not isinstance(settings.get("r"), int) or not isinstance(settings.get("lora_alpha"), int | float):
        raise ValueError(f"{where}: r and lora_alpha must be numbers")


def _read_modules(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`lora_A` and `lora_B` of every module of the file, in float32."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; save the adapter with safetensors (PEFT's default)")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if not match:
            raise ValueError(f"{file}: unexpected tensor {name}; only lora_A and lora_B of linear maps are read")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor.astype(np.float32)
    if half := sorted(name for name, parts in factors.items() if len(parts) < 2):
        raise ValueError(f"{file}: one of lora_A and lora_B is missing of {', '.join(half)}")
    if not factors:
        raise ValueError(f"{file}: holds no adapter")
    return {name: (parts["A"], parts["B"]) for name, parts in factors.items()}


def _owners(config: ModelConfig) -> dict[str, list[tuple[str, int, Source]]]:
    """By tensor of a kernel in the checkpoint: our linear maps it stands for, as path and layer, in the order of its parts."""
    owners: dict[str, list[tuple[str, int, Source]]] = {}
    for path, source in sources(config).items():
        if path.endswith("/kernel") and path != f"{UNADAPTED}/kernel":
            for layer, name in enumerate(source.names):
                owners.setdefault(name, []).append((path.removesuffix("/kernel"), layer, source))
    return owners


def _scale(settings: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """What PEFT multiplies the product of a module's factors with."""

    def setting(pattern: str, default: Any) -> Any:
        patterns = settings.get(pattern) or {}
        try:
            return next((x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
        except re.error as error:
            raise ValueError(f"{where}: {pattern} holds no regular expressions ({error})") from error

    told, alpha = setting("rank_pattern", settings["r"]), setting("alpha_pattern", settings["lora_alpha"])
    if told != rank:
        raise ValueError(f"{where}: says rank {told} of {module}, whose tensors have {rank}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _stack(path: str, layers: Mapping[int, Factors], table: Mapping[str, Source]) -> Params:
    """The parameters of one linear map from those of its layers."""
    source = table[f"{path}/kernel"]
    rank = max(one.a.shape[1] for one in layers.values())
    *_, inputs, outputs = source.param_shape
    count = len(source.names)
    a, b = np.zeros((count, inputs, rank), np.float32), np.zeros((count, rank, outputs), np.float32)
    scale = np.ones(count, np.float32)
    for layer, one in layers.items():
        own = one.a.shape[1]
        a[layer, :, :own], b[layer, :own], scale[layer] = one
    stacked = {f"{path}/lora_a": a, f"{path}/lora_b": b, f"{path}/lora_scale": scale}
    return stacked if source.stacked else {name: x[0] for name, x in stacked.items()}


def save_adapters(
    folder: str | Path, config: ModelConfig, params: Mapping[str, Any], base: str | Path, dtype: Any = None
) -> None:
    """Writes the adapters among `params` as a folder that `peft.PeftModel.from_pretrained` reads (transformers 4.52 or later).

    In a job of several processes all call together and the lead process writes.

    Args:
      folder: must not exist yet, or be empty; appears complete or not at all.
      config: of the model.
      params: nested; everything but the adapters is left out.
      base: what `base_model_name_or_path` shall say.
      dtype: of the tensors; None is float32.

    Raises:
      FileExistsError: the folder has content.
      ValueError: no adapters.
    """
    flat = {path: to_host(x).astype(np.float32) for path, x in flatten(params).items() if path.endswith(ADAPTER)}
    adapted = set(adapted_paths(flat))
    if not adapted:
        raise ValueError("the policy has no adapters; write it whole instead")
    dtype = jnp.dtype(dtype or jnp.float32)
    tensors: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for name, parts in _owners(config).items():
        if adapted.isdisjoint(path for path, _, _ in parts):
            continue
        module = _saved_name(name.removesuffix(".weight"))
        one = _side_by_side([_factors(flat, *part) for part in parts])
        for letter, factor in (("A", one.a), ("B", one.b)):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = np.ascontiguousarray(factor.T.astype(dtype))
        sizes[module] = one.a.shape[1], round(one.scale * one.a.shape[1], 6)  # alpha, without float32's last digits
    if distributed.is_lead():
        with atomic_folder(folder, CONFIG) as draft:
            save_file(tensors, draft.path / WEIGHTS, {"format": "pt"})
            write_json(draft.path / CONFIG, _settings(sizes, str(base)))
    distributed.barrier()


def _factors(flat: Mapping[str, np.ndarray], path: str, layer: int, source: Source) -> Factors:
    """One layer's adapter of a linear map; of rank 0 where it has none."""
    if f"{path}/lora_a" not in flat:
        return Factors(np.zeros((source.matrix[1], 0)), np.zeros((0, source.matrix[0])), 1.0)
    a, b, scale = (flat[f"{path}/{name}"] for name in ADAPTER)
    return Factors(a[layer], b[layer], float(scale[layer])) if source.stacked else Factors(a, b, float(scale))


def _side_by_side(parts: list[Factors]) -> Factors:
    """One adapter for the maps of a fused module: its outputs are theirs, one after the other."""
    scale = next(part.scale for part in parts if part.a.shape[1])
    b = np.zeros((sum(p.b.shape[0] for p in parts), sum(p.b.shape[1] for p in parts)), np.float32)
    row = column = 0
    for part in parts:
        rank, outputs = part.b.shape
        b[row : row + rank, column : column + outputs] = part.b * (part.scale / scale)
        row, column = row + rank, column + outputs
    return Factors(np.concatenate([part.a for part in parts], axis=1), b, scale)


def _saved_name(released: str) -> str:
    """A module's name in transformers 4.52 and later."""
    new, old = next((new, old) for new, old in NEW_PREFIXES.items() if released.startswith(old))
    return new + released.removeprefix(old)


def _settings(sizes: Mapping[str, tuple[int, float]], base: str) -> dict[str, Any]:
    """`adapter_config.json` for modules of given rank and alpha."""
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, (_, a) in sizes.items() if a != alpha},
        "target_modules": _targets(sizes),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def _targets(modules: Iterable[str]) -> str:
    """A regular expression that matches these modules alone: every layer has them, so one pattern for each kind."""
    return "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in modules}))
