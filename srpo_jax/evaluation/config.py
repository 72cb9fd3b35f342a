"""From the `eval` section of an `ml_collections` configuration to benchmark, evaluator and decodings."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from srpo_jax.data import loaders, scenes
from srpo_jax.data.records import Record
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.evaluation.benchmarks.registry import RSBENCH
from srpo_jax.evaluation.evaluators import Evaluator, as_evaluator, evaluator_for
from srpo_jax.evaluation.generate import GenerateConfig
from srpo_jax.judges.registry import JudgeError, make_judge
from srpo_jax.trees import PATCHES

HELD_OUT = ("test_id", "combination", "rendering", "wording")


class EvalConfigError(ValueError):
    """An `eval` section that cannot be used; names the field."""


def default_config() -> ml_collections.ConfigDict:
    """All fields of the section with their defaults.

    Fields:
      name: "scenes" (the embedded world), "jsonl" or "datasets"; empty for that of the training data.
      path: of the JSONL file; saved folder, Parquet file or hub id of a data set.
      images: folder of the pictures; if empty, that of the JSONL file, or where `data.loaders.load_hf` keeps embedded ones.
      splits: of the embedded world or of the data set.
      n: records per split (of the embedded world an even number); None for all.
      data_seed: of the embedded world.
      evaluator: "package.module:NAME" of an `Evaluator`, or a judge (see `judges.registry`); empty for the data set's own.
      benchmarks: what to evaluate: "rsbench" (the data set above), published benchmarks and suites (see
        `evaluation.benchmarks.registry`).
      plain: whether a turn without tags is an answer without a path, as of checkpoints that do not reason in tags.
      temperatures: one evaluation each; 0 is greedy.
      samples: responses per prompt at temperatures above 0.
      max_tokens, batch, trunk, patches, gather, seed: see `GenerateConfig`.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    config = ml_collections.ConfigDict()
    config.update(name="", path="", images="", splits=HELD_OUT, n=placeholder(int), data_seed=0, evaluator="")
    config.update(benchmarks=(RSBENCH,), plain=False)
    config.update(temperatures=(0.0, 1.0), patches=PATCHES)
    config.update({name: defaults[name] for name in ("samples", "max_tokens", "batch", "trunk", "gather", "seed")})
    return config


def decodings(config: ml_collections.ConfigDict) -> list[GenerateConfig]:
    """How to sample, one entry per temperature; greedy decoding takes one sample.

    Raises:
      EvalConfigError: no temperature, or a field that `GenerateConfig` refuses.
    """
    if not config.temperatures:
        raise EvalConfigError("config.eval.temperatures is empty; name at least one (0 is greedy)")
    shared: dict[str, Any] = {name: config[name] for name in ("max_tokens", "batch", "gather", "seed")}
    shared["trunk"] = tuple(config.trunk)
    shared["patches"] = None if config.patches is None else tuple(config.patches)
    try:
        return [
            GenerateConfig(temperature=float(t), samples=config.samples if t else 1, **shared)
            for t in config.temperatures
        ]
    except ValueError as error:
        raise EvalConfigError(f"config.eval: {error}") from error


def build_benchmark(config: ml_collections.ConfigDict, difficulty: Difficulty | None = None) -> list[Record]:
    """The records of the section, split by split.

    Args:
      config: the section, its data set named.
      difficulty: of the embedded world.

    Raises:
      EvalConfigError: an unknown data set, or a missing path.
      ValueError: broken records or an unknown split; names them.
    """
    if config.name == "scenes":
        return [r for split in config.splits for r in scenes.records(split, config.n, config.data_seed, difficulty)]
    if config.name not in ("jsonl", "datasets") or not config.path:
        raise EvalConfigError(
            f"config.eval.name={config.name!r}, path={config.path!r}: your own data is evaluated on records of yours, kept out "
            "of training: set eval.path and eval.evaluator (and eval.name, 'jsonl' or 'datasets', if it is not that of the "
            "training data); eval.name='scenes' measures the embedded world"
        )
    if config.name == "jsonl":
        return loaders.load_jsonl(config.path, config.images or Path(config.path).parent, check_images=True)[: config.n]
    options: dict[str, Any] = {"image_folder": config.images or None, "check_images": True}
    return [r for split in config.splits for r in loaders.load_hf(config.path, split, **options)[: config.n]]


def build_evaluator(config: ml_collections.ConfigDict, folder: str | Path | None = None) -> Evaluator:
    """The evaluator that the section names, or that of its data set.

    Args:
      config: the section.
      folder: where a judge that costs money keeps its raw answers.

    Raises:
      EvalConfigError: it is none, or the data set has none of its own.
    """
    if not config.evaluator:
        try:
            return evaluator_for(config.name)
        except ValueError as error:
            raise EvalConfigError(
                f"config.eval.evaluator is empty: {error}, and name it here (or as --judge): 'package.module:NAME', or a judge "
                "of docs/judges.md"
            ) from error
    if (found := _named(config.evaluator)) is not None:
        return found
    try:
        return as_evaluator(make_judge(config.evaluator, folder))
    except JudgeError as error:
        raise EvalConfigError(f"config.eval.evaluator (--judge): {error}") from error


def _named(spec: str) -> Evaluator | None:
    """An `Evaluator` given as "package.module:NAME"; None for anything else, which may name a judge."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError, ValueError):
        return None
    return found if isinstance(found, Evaluator) else None
