"""A whole run, top to bottom: explore, update, checkpoint, repeat.

A run is a function of its configuration. Its work directory holds

    config.json  metrics.jsonl  checkpoints/  trees/round_000/{round.json,branches.jsonl,verdicts.jsonl}

and may be killed at any moment: the same command goes on from the newest checkpoint and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from srpo_jax import distributed, observe, preemption, sharding
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.data.loaders import Records
from srpo_jax.data.records import Record
from srpo_jax.data.sft import SftRecord
from srpo_jax.exploration.explorer import ExploreConfig, exploration_statistics, explore
from srpo_jax.exploration.judging import Judge
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.flops import TreeSize, update_flops
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.fingerprint import params_fingerprint
from srpo_jax.models.geometry import empty_vision
from srpo_jax.models.heads import without_heads
from srpo_jax.models.policy import Policy
from srpo_jax.models.quantize import compute_params
from srpo_jax.paths import STYLES
from srpo_jax.preemption import Preempted
from srpo_jax.training.annotate import annotate
from srpo_jax.training.data import BatchConfig, EncodedTrees, RecordTrees, StepBatch, round_records, step_batches
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.progress import Profile, Progress
from srpo_jax.training.state import Flat, OptimConfig, TrainState, abstract_state, init_state, place_frozen
from srpo_jax.training.step import ComputeConfig, check_image_cache, make_update
from srpo_jax.training.workdir import MetricsLog, NoLog, Tracker, open_log
from srpo_jax.trees import PackConfig, ReasoningTree, Trunk, check_trunks, select_pairs, usable_branches


class TrainingError(RuntimeError):
    """A run that must not go on: what happened, where, and what to change."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that shapes a run besides policy, data and judge.

    Attributes:
      seed: of sampling and, with `batch.seed`, of the order of questions.
      rounds: how often to explore with the newest policy; 0 trains on reference paths alone.
      updates: updates per round.
      checkpoint_every: updates between checkpoints; the end of a round is always saved.
      keep: checkpoints to keep.
      checkpoints: where they are, this run's alone: a folder, or an address such as gs://bucket/run; empty for the work
        directory.
      max_unknown: share of branches without a verdict at which training stops.
      max_truncated: share of truncated branches at which it stops.
      style: how reference paths are written, one of `paths.STYLES`; exploration branches from the steps of "long" alone.
      records_per_round: how many records a round explores, in an order that each epoch shuffles; None for all of them.
      trainable: regular expressions over parameter paths; None for the adapters, or everything where there are none.
    """

    explore: ExploreConfig
    loss: LossConfig
    optim: OptimConfig
    pack: PackConfig
    batch: BatchConfig
    compute: ComputeConfig = ComputeConfig()
    seed: int = 0
    rounds: int = 1
    updates: int = 100
    checkpoint_every: int = 50
    keep: int = 2
    checkpoints: str = ""
    max_unknown: float = 0.5
    max_truncated: float = 0.5
    style: str = "long"
    records_per_round: int | None = None
    trainable: tuple[str, ...] | None = None


def train(
    policy: Policy,
    data: Sequence[Record | SftRecord] | Sequence[ReasoningTree],
    judge: Judge | None,
    config: RunConfig,
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    profile: Profile | None = None,
    *,
    donate: bool = False,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Trains `policy` and returns its new parameters.

    Args:
      policy: where to start.
      data: records to explore or, with `rounds=0`, records or ready trees to learn as they are; `Records` are read when they
        are wanted, by index.
      judge: of branches; None with `rounds=0`.
      config: of the run.
      workdir: an open work directory (see `training.workdir`).
      mesh: from `sharding.make_mesh`.
      profile: which update to trace, if any.
      donate: parameters of `policy` that train are deleted once the run has its own copy of them; unless an objective reads
        the policy before training.
      tracker: is told every number of a step beside the logs of the work directory, on the lead process alone.

    Raises:
      TrainingError: a loss that is not finite, too many unknown or truncated branches, a round without any pair, or one of
        records without steps.
      preemption.Preempted: the process was asked to end; the update under way is saved.
    """
    workdir = Path(workdir)
    optimizer, offload = config.optim.make(), config.optim.offload
    donate = donate and "reference" not in config.pack.extras
    placed: dict[str, Any] = {"own": config.loss.parameters(policy.config.text.hidden_size), "offload": offload}
    with Checkpointer(config.checkpoints or workdir / "checkpoints", keep=config.keep) as checkpoints:
        if checkpoints.latest() is None:
            state = init_state(policy.params, optimizer, config.trainable, mesh, **placed)
            _delete(policy, state.params if donate else {})
        else:  # into shapes: a fresh state beside the restored one would take the memory twice
            like = abstract_state(policy.params, optimizer, config.trainable, mesh, **placed)
            frozen = place_frozen(policy.params, like.frozen)
            _delete(policy, like.params if donate else {})
            state = _resume(checkpoints, like.moving(), frozen, config)
        features = _features(policy, state, config)
        update = make_update(policy.graphdef, optimizer, config.loss, config.compute, mesh, state, offload=offload)
        step, trunks = int(state.step), None
        with open_log(workdir, step, tracker) as log:
            progress = Progress(log, max(1, config.rounds) * config.updates)
            for round_ in range(max(1, config.rounds)):
                first, stop = round_ * config.updates, (round_ + 1) * config.updates
                if step >= stop:
                    continue
                records = round_records(data, config.records_per_round, config.seed, round_) if config.rounds else data
                if trunks is None or records is not data:
                    trunks = _trunks(policy, records, config)
                checkpoints.wait()  # what explores a round is on the disk before the first of its trees
                trees, statistics = _trees(
                    policy, state, records, trunks, judge, config, workdir, round_, features, at_start=step == first
                )
                nothing = empty_vision(policy.config.vision) if features is None else features.nothing
                source = trees if features is None else EncodedTrees(trees, features)
                batch = dataclasses.replace(config.batch, seed=config.seed + config.batch.seed + round_)
                parts, mine = sharding.batch_parts(mesh), sharding.local_parts(mesh)
                work = _work_of(policy, state, config.pack)
                batches = step_batches(
                    source, config.pack, batch, step, stop, first, parts, mine, f"round {round_}", work, nothing
                )
                state = _round(
                    update, state, batches, stop, config, checkpoints, log, progress, statistics, mesh, profile
                )
                step = int(state.step)
            return state.all_params()


def _resume(checkpoints: Checkpointer, like: TrainState, frozen: Flat, config: RunConfig) -> TrainState:
    state, metadata = checkpoints.restore(None, like)
    state = state._replace(frozen=frozen)
    expected = _metadata(state, config)
    if metadata != expected:
        raise TrainingError(
            f"the checkpoint of step {int(state.step)} in {checkpoints.directory} says {metadata}, this run {expected}; use "
            "another work directory"
        )
    logging.info("resumed from step %d", int(state.step))
    return state


def _metadata(state: TrainState, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint tells beside its arrays; of frozen parameters it holds a fingerprint alone."""
    return {"seed": config.seed, "next_update": int(state.step), "frozen": params_fingerprint(state.frozen)}


def _delete(policy: Policy, paths: Iterable[str]) -> None:
    """Frees parameters of the policy."""
    params = sharding.flatten(policy.params)
    for path in without_heads(dict.fromkeys(paths)):
        params[path].delete()


def _trunks(policy: Policy, data: Sequence[Any], config: RunConfig) -> list[Trunk]:
    """The records' trunks, each of a size that exploration and update take, made once for rounds of the same records; trees
    have theirs, and records by index get theirs when they are read."""
    if isinstance(data, Records) or not len(data) or not isinstance(data[0], Record | SftRecord):
        return []
    if config.rounds and isinstance(data[0], SftRecord):
        raise TrainingError(
            f"record {data[0].id!r} and its like have no steps to branch from; train on them as they are, with rounds=0"
        )
    trunks = [make_trunk(record, policy.processor, STYLES[config.style]) for record in data]
    check_trunks(trunks, config.pack, *([config.explore.k, config.explore.max_tokens] if config.rounds else []))
    return trunks


def _features(policy: Policy, state: TrainState, config: RunConfig) -> FeatureCache | None:
    """The cache of `compute.image_cache`."""
    check_image_cache(state, config.compute)
    room = int(config.compute.image_cache * 2**30)
    return FeatureCache(policy, state.all_params(), config.compute.dtype, room) if room else None


def _trees(
    policy,
    state: TrainState,
    data,
    trunks,
    judge,
    config: RunConfig,
    workdir: Path,
    round_: int,
    features: FeatureCache | None,
    *,
    at_start: bool,
):
    """The trees of a round and what to report of them with its first update."""
    if config.rounds == 0:
        if isinstance(data, Records):
            return RecordTrees(data, policy.processor, config.pack, STYLES[config.style]), {}
        data = [ReasoningTree(trunk, ()) for trunk in trunks] or data
        if config.pack.extras:
            data = annotate(data, policy, config.pack, config.compute, config.batch.trees, workdir / "trees")
        return data, {}
    folder = workdir / "trees" / f"round_{round_:03d}"
    params = None  # those that explored a round under way are gone
    if at_start:
        params = compute_params(state.all_params(), config.compute.dtype)  # what the update computes with
    key = jax.random.key(config.seed)
    oldest = round_ - min(round_, config.explore.max_age)
    earlier = _earlier(policy, data, trunks, judge, config, workdir, oldest, round_)
    options = {"round_": round_, "folder": folder, "trunks": trunks, "features": features, "earlier": earlier}
    trees = explore(policy, params, data, config.explore, judge, key, **options)
    statistics = exploration_statistics(trees, {record.id: record.risky for record in data})
    check_round(statistics, trees, config, round_)
    trees = annotate(trees, policy, config.pack, config.compute, config.batch.trees, folder)
    return trees, statistics if at_start else {}


def _earlier(policy, data, trunks, judge, config: RunConfig, workdir: Path, oldest: int, round_: int):
    """The trees of the round before `round_`, read again, with branches of the rounds from `oldest` on."""
    trees: Sequence[ReasoningTree] = ()
    for before in range(oldest, round_):
        folder = workdir / "trees" / f"round_{before:03d}"
        options = {"round_": before, "folder": folder, "trunks": trunks, "earlier": trees, "progress": False}
        trees = explore(policy, None, data, config.explore, judge, jax.random.key(config.seed), **options)
    return trees


def check_round(
    statistics: Mapping[str, float], trees: Sequence[ReasoningTree], config: RunConfig, round_: int
) -> None:
    """Raises TrainingError where a round of exploration is not worth learning from."""
    for name, limit in (("truncated", config.max_truncated), ("unknown", config.max_unknown)):
        share = statistics[f"explore/{name}"]
        if share > limit:
            raise TrainingError(
                f"round {round_}: {share:.1%} of the branches are {name}, the limit max_{name} is {limit:.1%}. Truncated: "
                "raise explore.max_tokens. Malformed: the policy does not write the path grammar yet; train it on reference "
                "paths first (rounds=0). Judge failures: see verdicts.jsonl"
            )
    if config.loss.contrasts() and not any(has_pair(tree, config.pack) for tree in trees):
        raise TrainingError(
            f"round {round_}: no prefix of any of {len(trees)} trees has both a favourable and an unfavourable branch, so "
            f"there is nothing to contrast (favourable: {statistics['explore/favourable_risky']:.1%} of risky, "
            f"{statistics['explore/favourable_harmless']:.1%} of harmless branches). Raise explore.k or "
            "explore.temperature, use other records, or train on references alone (rounds=0)"
        )


def has_pair(tree: ReasoningTree, config: PackConfig) -> bool:
    """Whether a prefix has a favourable and an unfavourable branch, as `pack_trees` counts them."""
    branches, verdicts, _ = usable_branches(tree, config)
    return bool(select_pairs([b.prefix for b in branches], verdicts, config.max_pairs).any())


def _work_of(policy: Policy, state: TrainState, pack: PackConfig) -> Callable[[ReasoningTree], float]:
    """Operations of a tree's share of an update, on the branches that it learns from."""
    flat, trained = state.params | state.frozen, set(state.params)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}

    def work(tree: ReasoningTree) -> float:
        used = dataclasses.replace(tree, branches=tuple(usable_branches(tree, pack)[0]))
        size = TreeSize.of(used, policy.config.vision, pack)
        return update_flops(policy.config, shapes, trained, size).model.total

    return work


def _round(
    update,
    state: TrainState,
    batches,
    stop: int,
    config: RunConfig,
    checkpoints: Checkpointer,
    log: MetricsLog | NoLog,
    progress: Progress,
    statistics: dict[str, float],
    mesh: jax.sharding.Mesh,
    profile: Profile | None,
) -> TrainState:
    """The updates of one round."""
    learning_rates = config.optim.learning_rates()
    while (batch := _next(batches)) is not None:
        step = batch.step + 1
        with profile.at(step) if profile else contextlib.nullcontext(), observe.span("update"):
            state, metrics = update(state, sharding.place_batch(batch.batches, mesh))
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        preemption.defer(True)
        metrics["learning_rate"] = float(learning_rates(batch.step))
        _check_finite(metrics, batch)
        log.write(step, metrics | {f"batch/{k}": v for k, v in batch.counters.items()} | statistics)
        statistics = {}
        ends = distributed.anywhere(preemption.requested())
        with observe.span("save"):
            if step % config.checkpoint_every == 0 or step == stop or ends:
                checkpoints.save(step, state.moving(), _metadata(state, config))
            if step == stop or ends:
                checkpoints.wait()
        progress.step(step, metrics, batch.counters)
        if ends:
            raise Preempted(f"asked to end: step {step} is saved, the same command goes on from there")
    preemption.defer(False)
    return state


def _next(batches: Iterator[StepBatch]) -> StepBatch | None:
    with observe.span("data"):
        return next(batches, None)


def _check_finite(metrics: Mapping[str, float], batch: StepBatch) -> None:
    if not all(map(math.isfinite, metrics.values())):
        bad = sorted(name for name, x in metrics.items() if not np.isfinite(x))
        raise TrainingError(
            f"update {batch.step}: {', '.join(bad)} not finite. Records in this update: {', '.join(batch.record_ids)}. "
            "Look at their images and texts, or lower optim.learning_rate; the last checkpoint is intact"
        )
