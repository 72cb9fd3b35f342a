"""From an `ml_collections` configuration to the typed configurations of the library, and to policy, data and judge.

The defaults of every section are those of its dataclass, which also documents the fields; a configuration file starts
from `default_config()` and changes what it wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from etils import epath
from ml_collections.config_dict import placeholder

from srpo_jax import sharding
from srpo_jax.data import loaders, scenes
from srpo_jax.data.world.difficulty import Difficulty
from srpo_jax.evaluation import config as evaluation
from srpo_jax.exploration.explorer import ExploreConfig
from srpo_jax.exploration.judging import Judge
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.judges.registry import JudgeError, make_judge
from srpo_jax.models.lora import LoraConfig
from srpo_jax.models.policy import Policy, adapt, load_policy
from srpo_jax.paths import STYLES
from srpo_jax.training.data import BatchConfig
from srpo_jax.training.loop import RunConfig
from srpo_jax.training.objective import TERMS, LossConfig
from srpo_jax.training.state import OptimConfig
from srpo_jax.training.step import ComputeConfig
from srpo_jax.trees import PATCHES, PackConfig, rows_needed

EMBEDDED = "embedded"
FILES = ("jsonl", "datasets", "arrayrecord")
ASSETS = Path(__file__).parent / "assets"
SECTIONS = {
    "explore": ExploreConfig,
    "optim": OptimConfig,
    "pack": PackConfig,
    "batch": BatchConfig,
    "compute": ComputeConfig,
}


class ConfigError(ValueError):
    """A configuration that cannot be used; names the field."""


def default_config() -> ml_collections.ConfigDict:
    """All fields with their defaults, locked: a misspelt field raises where it is set.

    Beside the sections of `RunConfig`:
      policy: `path` of a Hugging Face folder ("embedded" for the small policy in the package) or of adapters in PEFT's
        format, `base` of such adapters (None for the folder that they name), `min_pixels`, `max_pixels`,
        `max_image_tokens` (None keeps the checkpoint's), `dtype` of loaded parameters (None keeps the file's), `quantize`
        "int8" for the layers' kernels (None does not; they are frozen then).
      lora: see `models.lora.LoraConfig`; a rank of 0 is no adapters.
      data: `name` "scenes" (the embedded world), "jsonl" (`path`, `images`), "datasets" (`path`: saved folder, Parquet file or
        hub id; `split`) or "arrayrecord" (`path`: folder; `split`); `images`: folder of the pictures (see `data.loaders`;
        empty for its default); `schema` "ssui", or "sft" for records without steps; `n` records (None for all); `lazy`: read
        by index when wanted, for data that memory does not hold, instead of all at the start; `max_broken` records may be
        passed over; `seed` and `difficulty` of the embedded world, see `data.world.difficulty.Difficulty`.
      loss: `weights` by objective (`training.objective.TERMS`), `schedules` of them, and each objective's options under
        its name, such as `loss.srpo.lambda_`.
      judge: "rules" for the embedded world, or "package.module:function", a judge of yours.
      mesh: sizes of the axes.
      eval: see `evaluation.config.default_config`.

    Every shape of a batch is bounded by a ladder, so that the number of programs to compile is, too; None for a ladder
    of `patches` pads to the largest of each batch instead.
    """
    config = ml_collections.ConfigDict()
    config.policy = {
        "path": EMBEDDED,
        "base": placeholder(str),
        "min_pixels": placeholder(int),
        "max_pixels": placeholder(int),
        "max_image_tokens": placeholder(int),
        "dtype": placeholder(str),
        "quantize": placeholder(str),
    }
    config.lora = _defaults(LoraConfig)
    config.data = {"name": "scenes", "path": "", "images": "", "split": "train", "n": placeholder(int), "seed": 0}
    config.data.update(schema="ssui", lazy=False, max_broken=0)
    config.data.difficulty = _defaults(Difficulty)
    config.judge = "rules"
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.explore = _defaults(ExploreConfig, patches=PATCHES)
    config.loss = {
        "weights": dict.fromkeys(TERMS, 0.0) | dict(LossConfig().weights),
        "schedules": dict.fromkeys(TERMS, ()),
    }
    config.loss.update({name: term.defaults() for name, term in TERMS.items() if term.defaults()})
    config.optim = _defaults(OptimConfig, learning_rate=1e-5, steps=placeholder(int))
    config.pack = _defaults(
        PackConfig,
        trunk=(256, 512, 1024, 2048, 4096),
        path=(128, 256, 512, 1024),
        rows=(8, 16, 24, 32, 40),
        row=256,
        branches=(24,),
        branch=(256,),
        patches=PATCHES,
    )
    del config.pack["extras"], config.pack["learns"]  # the objectives tell
    config.batch = _defaults(BatchConfig, trees=8)
    config.compute = _defaults(ComputeConfig)
    config.eval = evaluation.default_config()
    for field in dataclasses.fields(RunConfig):
        if field.name not in (*SECTIONS, "loss"):
            kind = int if "int" in str(field.type) else tuple
            config[field.name] = placeholder(kind) if field.default is None else field.default
    return config.lock()


def _defaults(cls: type, **given: Any) -> dict[str, Any]:
    """The dataclass's defaults, save for those `given`; None becomes a placeholder that a flag can fill."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = given.get(field.name, field.default)
        kind = int if str(field.type).startswith("int") else tuple
        values[field.name] = placeholder(kind) if default is None else default
    return values


def run_config(config: ml_collections.ConfigDict) -> RunConfig:
    """The typed configuration of a run; `optim.steps` defaults to all updates of the run.

    With `rounds=0` there are no branches, whatever `pack` says, and no padding for them.

    Raises:
      ConfigError: an unknown or missing field, or one that its section refuses.
    """
    steps = config.optim.steps or config.updates * max(1, config.rounds)
    loss = loss_config(config.loss)
    given: dict[str, dict[str, Any]] = {
        "optim": {"steps": steps},
        "pack": {"extras": loss.extras(), "learns": loss.learns()},
    }
    if config.rounds == 0:
        given["pack"] = {"extras": loss.extras(), **_trunks_alone(config.pack.trunk)}
    parts: dict[str, Any] = {
        name: _section(config[name], f"config.{name}", cls, **given.get(name, {})) for name, cls in SECTIONS.items()
    }
    plain = {f.name: config[f.name] for f in dataclasses.fields(RunConfig) if f.name not in (*SECTIONS, "loss")}
    plain["trainable"] = None if plain["trainable"] is None else tuple(plain["trainable"])
    run = RunConfig(loss=loss, **parts, **plain)
    _section(config.lora, "config.lora", LoraConfig)  # refused here rather than after the policy was read
    _check_values(run)
    _check_data(config.data, run)
    if run.rounds:
        _check_shapes(run)
    return dataclasses.replace(run, pack=_with_masked_rows(run.pack))


def _with_masked_rows(pack: PackConfig) -> PackConfig:
    """With room for paths that are read once more without their prompts, where an objective asks for that."""
    if "key_slots" not in pack.extras:
        return pack
    return dataclasses.replace(pack, rows=tuple(sorted({r + -(-p // pack.row) for r in pack.rows for p in pack.path})))


def _trunks_alone(ladder: Sequence[int]) -> dict[str, Any]:
    """Fields of `PackConfig` for trees without branches: rows as short as an eighth of a trunk waste little at its end."""
    row = -(-ladder[0] // 8)
    return {"row": row, "rows": tuple(sorted({-(-t // row) for t in ladder})), "branches": (0,), "branch": (1,)}


def loss_config(section: ml_collections.ConfigDict) -> LossConfig:
    """The objectives of `config.loss`.

    Raises:
      ConfigError: an unknown objective or option, or a value that an objective refuses.
    """
    values = section.to_dict()
    weights, schedules = values.pop("weights", {}), values.pop("schedules", {})
    points = {name: tuple((int(u), float(f)) for u, f in given) for name, given in schedules.items()}
    try:
        return LossConfig(weights, values, points)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.loss: {error}") from error


def _check_values(run: RunConfig) -> None:
    """Raises ConfigError for numbers that would stop the run late, or make it do nothing."""
    if run.rounds == 0 and (idle := run.loss.need_branches()):
        raise ConfigError(
            f"config.rounds=0 explores nothing, but config.loss.weights gives {', '.join(idle)} a weight, which learns from "
            "explored branches; set rounds to at least 1, or train with weights.sft alone"
        )
    if run.pack.substitutes and "reference" in run.pack.extras:
        raise ConfigError(
            "config.pack.substitutes: substitutes have no reference log-probs, which config.loss.weights asks for"
        )
    if run.records_per_round and run.explore.max_age:
        raise ConfigError(
            f"config.explore.max_age={run.explore.max_age}: with config.records_per_round={run.records_per_round} "
            "every round has other records, so that no branch can stay; set max_age to 0 or records_per_round to None"
        )
    least = {
        "updates": (run.updates, 1),
        "rounds": (run.rounds, 0),
        "checkpoint_every": (run.checkpoint_every, 1),
        "keep": (run.keep, 1),
        "explore.max_tokens": (run.explore.max_tokens, 1),
        "explore.trees": (run.explore.trees, 1),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            raise ConfigError(f"config.{name}={value}: it must be at least {bound}")
    for name in ("max_unknown", "max_truncated"):
        if not 0 <= getattr(run, name) <= 1:
            raise ConfigError(f"config.{name}={getattr(run, name)}: it is a share between 0 and 1")
    if run.explore.temperature < 0:
        raise ConfigError(f"config.explore.temperature={run.explore.temperature}: it must be 0 or more")


def _check_data(data: ml_collections.ConfigDict, run: RunConfig) -> None:
    """Raises ConfigError for data that the run cannot use as it asks."""
    if run.style not in STYLES:
        raise ConfigError(f"config.style={run.style!r}: use one of {', '.join(STYLES)}")
    if run.rounds and (run.style != "long" or data.schema != "ssui"):
        raise ConfigError(
            f"config.style={run.style!r}, config.data.schema={data.schema!r}: branches start at the six steps of style 'long' "
            "of records with steps; set rounds=0 to train on other paths"
        )
    if data.schema == "sft" and run.style != "long":
        raise ConfigError(f"config.style={run.style!r} is made of six steps, which records of schema 'sft' do not have")
    steps = 0 if data.schema == "sft" else len(STYLES[run.style].titles)
    if {"key_slots", "understanding"} & set(run.pack.extras) and run.pack.key_step > steps:
        raise ConfigError(
            f"config.pack.key_step={run.pack.key_step}: paths of style {run.style!r} and schema {data.schema!r} end at step "
            f"{steps}, so there would be no key sentence; name another, or give config.loss.weights.key_sentence and "
            "safety_heads no weight"
        )
    if data.name == "scenes" and (data.lazy or data.max_broken or data.schema != "ssui"):
        raise ConfigError("config.data: lazy, max_broken and schema are for data that is read from files")
    if run.batch.workers and not (data.lazy and run.rounds == 0):
        raise ConfigError(
            f"config.batch.workers={run.batch.workers} read records while they are learned as they are; set data.lazy=True and "
            "rounds=0, or workers=0"
        )
    if data.max_broken < 0:
        raise ConfigError(f"config.data.max_broken={data.max_broken}: it must be at least 0")
    if run.records_per_round is not None and run.records_per_round < 1:
        raise ConfigError(f"config.records_per_round={run.records_per_round}: it must be at least 1, or None for all")


def _check_shapes(run: RunConfig) -> None:
    """Raises ConfigError where a tree that exploration can make would not fit the shapes of the update, hours later."""
    prefixes = range(len(GRAMMAR.titles)) if run.explore.prefixes is None else run.explore.prefixes
    count, tokens = run.explore.k * len(prefixes), run.explore.max_tokens
    substitutes = len(GRAMMAR.titles) * run.pack.substitutes
    needs = {"branch": tokens, "row": tokens - 1, "branches": count + substitutes}
    needs["rows"] = rows_needed(run.pack.trunk[-1], count + substitutes, tokens, run.pack.row)
    for name, needed in needs.items():
        largest = run.pack.row if name == "row" else getattr(run.pack, name)[-1]
        if largest < needed:
            raise ConfigError(
                f"config.pack.{name} ends at {largest}, but a trunk of pack.trunk={run.pack.trunk[-1]} tokens and explore.k="
                f"{run.explore.k} branches of up to explore.max_tokens={tokens} tokens can need {needed}; extend it"
            )
    if run.pack.trunk[-1] < run.explore.trunk[-1]:
        raise ConfigError(
            f"config.pack.trunk ends at {run.pack.trunk[-1]}, config.explore.trunk at {run.explore.trunk[-1]}: what can be "
            "explored must fit the update"
        )


def _section(section: ml_collections.ConfigDict, where: str, cls: type, **override: Any) -> Any:
    """The dataclass `cls` of a section's fields; lists, as JSON gives them back, become tuples."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()} | override
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{where} has no field {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def build_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over all devices."""
    return sharding.make_mesh(**config.mesh)


def check_batch(run: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the questions of a micro-batch cannot be split evenly over the mesh."""
    parts = sharding.batch_parts(mesh)
    if run.batch.trees % parts:
        trees = -(-run.batch.trees // parts) * parts
        accumulate = max(1, round(run.batch.trees * run.batch.accumulate / trees))
        raise ConfigError(
            f"config.batch.trees={run.batch.trees} questions cannot be split over data × fsdp = {parts} devices; set "
            f"batch.trees={trees}, batch.accumulate={accumulate} ({trees * accumulate} questions per update, now "
            f"{run.batch.trees * run.batch.accumulate}), or give config.mesh.tensor the devices"
        )


def policy_path(path: str) -> epath.Path:
    """Folder or address of the policy, "embedded" resolved to the one in the package."""
    return epath.Path(ASSETS / "base_policy" if path == EMBEDDED else path)


def build_policy(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Policy:
    """The policy of `config.policy`, parameters sharded over `mesh` as they are read, with the adapters of `config.lora`."""
    options, lora = config.policy.to_dict(), _section(config.lora, "config.lora", LoraConfig)
    policy = load_policy(policy_path(options.pop("path")), mesh=mesh, **options)
    return adapt(policy, lora, config.seed, mesh)


def build_difficulty(config: ml_collections.ConfigDict) -> Difficulty:
    """How hard the embedded world is, for records, demonstrations and evaluation alike."""
    return _section(config.data.difficulty, "config.data.difficulty", Difficulty)


def eval_section(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The `eval` section, its data set that of training where it names none; own data needs a path and an evaluator."""
    section = config.eval.copy_and_resolve_references()
    section.name = section.name or config.data.name
    return section


def build_records(config: ml_collections.ConfigDict) -> Sequence[Any]:
    """The training records of `config.data`, `Record` or by its schema `SftRecord`; all of them in memory unless `lazy`.

    Raises:
      ConfigError: an unknown data set or a missing path.
      data.loaders.LoadError: broken records; names file, line, record and field.
    """
    data = config.data
    if data.name == "scenes":
        return scenes.records(data.split, data.n, data.seed, build_difficulty(config))
    if data.name not in FILES or not data.path:
        raise ConfigError(
            f"config.data.name={data.name!r}, path={data.path!r}: use 'scenes', or one of {', '.join(FILES)} with a path"
        )
    if data.name == "jsonl" and not Path(data.path).is_file():
        raise ConfigError(f"config.data.path={data.path!r}: no such file; give one JSON object per line (docs/data.md)")
    # Pictures of records that stay in memory are kept in files; others are decoded when their record is read.
    kept = data.name != "jsonl" and (config.rounds or not data.lazy)
    folder = data.images or (loaders.image_cache() if kept else None)
    options: dict[str, Any] = {"image_folder": folder, "schema": data.schema, "max_broken": data.max_broken}
    source = loaders.open_records(data.path, data.name, data.split, **options)
    if data.lazy:
        return source[: data.n]
    return loaders.load_records(source, check_images=True)[: data.n]


def build_judge(config: ml_collections.ConfigDict, folder: str | Path | None = None) -> Judge:
    """The judge of `config.judge`; `folder` is where one that costs money keeps its raw answers.

    Raises:
      ConfigError: no such judge, or the rules of the embedded world for other data.
    """
    if config.judge == "rules" and config.data.name != "scenes":
        raise ConfigError(
            "config.judge='rules' knows the embedded world only; for your own data give 'package.module:function', "
            "a function (record, parsed path) -> srpo_jax.judges.Verdict, or set rounds=0 to train on reference paths alone"
        )
    try:
        return make_judge(config.judge, folder)
    except JudgeError as error:
        raise ConfigError(f"config.judge={error}") from error
