"""Where the trees of an update come from, and in which order: a pure function of the step.

Trees that exploration made lie in memory. Records that are learned as they are may be far too many for that: they are read and
made into trees when an update wants them, ahead of it and in other processes if asked (`RecordTrees`). Only indices are
shuffled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags, logging

from srpo_jax import distributed
from srpo_jax.data.images import open_image
from srpo_jax.data.loaders import Records
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk, render_trunk
from srpo_jax.inputs import Features, VisionInputs
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.processor import Processor
from srpo_jax.paths import Grammar
from srpo_jax.trees import (
    PackConfig,
    PackShape,
    ReasoningTree,
    TreeBatch,
    balance,
    check_trunks,
    pack_shape,
    pack_trees,
)

SHOWN = 5
"""How many broken records a message names."""


class BrokenRecordsError(ValueError):
    """More broken records than `data.max_broken`; names them and what is wrong."""


class StepBatch(NamedTuple):
    """What one update reads.

    Attributes:
      step: index of the update.
      batches: with a leading axis of micro-batches; of several processes, this one's part of it.
      record_ids: of the questions in it.
      counters: from `pack_trees`.
    """

    step: int
    batches: TreeBatch
    record_ids: list[str]
    counters: dict[str, int]


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How many questions an update reads, and in which order.

    Attributes:
      trees: questions per micro-batch, over all devices together; a multiple of the mesh's data × fsdp.
      accumulate: micro-batches per update.
      seed: of the order of questions.
      threads: that pack batches ahead.
      workers: processes that read records and make them into trees ahead, where they are read lazily; 0 leaves it to the
        threads.

    Raises:
      ValueError: no question or no micro-batch, or a negative number of workers.
    """

    trees: int
    accumulate: int = 1
    seed: int = 0
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: it must be at least 0")
        if min(self.trees, self.accumulate) < 1:
            raise ValueError(f"trees={self.trees}, accumulate={self.accumulate}: both must be at least 1")


class RecordTrees(Sequence[ReasoningTree]):
    """Trunks without branches, made of records when they are read.

    The place of a broken record is taken by the next whole one, so that an update keeps its size and stays a function of its
    number and the data.

    Args:
      records: by index; `max_broken` of them may be broken.
      processor: of the policy.
      pack: whose shapes a trunk must fit.
      grammar: how paths are written.
    """

    def __init__(self, records: Records, processor: Processor, pack: PackConfig, grammar: Grammar = GRAMMAR):
        self.records, self._processor, self._pack, self._grammar = records, processor, pack, grammar

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        tree = ReasoningTree(make_trunk(self.records[index], self._processor, self._grammar), ())
        check_trunks((tree.trunk,), self._pack)
        return tree

    def read(self, index: int) -> tuple[ReasoningTree | None, dict[int, str]]:
        """The tree of record `index` or of the next whole one, and what is wrong with those before it, by index.

        No tree if more than `max_broken` in a row are broken.
        """
        faults: dict[int, str] = {}
        for _ in range(self.records.max_broken + 1):
            try:
                return self[index], faults
            except ValueError as error:
                faults[index] = str(error)
            index = (index + 1) % len(self)
        return None, faults


def round_records(data: Sequence, count: int | None, seed: int, round_: int) -> Sequence:
    """The records that a round explores.

    Args:
      data: all records, in memory or by index.
      count: how many a round explores, in an order that each epoch shuffles; None for all of them.
      seed: of that order.
      round_: number of the round.

    Raises:
      BrokenRecordsError: more broken ones than the data may have; others are left out.
    """
    if count is None and not isinstance(data, Records):
        return data
    wanted: list[int] = list(range(len(data)))
    if count is not None and count < len(data):
        order = grain.MapDataset.range(len(data)).shuffle(seed=seed).repeat()
        # Where an epoch ends within a round, a record may come twice; it is explored once.
        wanted = list(dict.fromkeys(int(order[i]) for i in range(round_ * count, (round_ + 1) * count)))
    if not isinstance(data, Records):
        return [data[i] for i in wanted]
    records: list[Any] = []
    faults: dict[int, str] = {}
    for index in wanted:
        try:
            record = data[index]
            for image in record.images:
                open_image(image)
            records.append(record)
        except ValueError as error:
            faults[index] = str(error)
            check_broken(faults, data.max_broken)
    return records


def check_broken(faults: Mapping[int, str], most: int) -> None:
    """Raises BrokenRecordsError where there are more faults than that; they are given by index."""
    if len(faults) <= most:
        return
    told = [f"  {faults[index]}" for index in sorted(faults)[:SHOWN]]
    told += [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    raise BrokenRecordsError(
        f"{len(faults)} broken records, data.max_broken allows {most}; mend or remove them, or raise it:\n"
        + "\n".join(told)
    )


class _Reader:
    """The trees of an update by its number, with the faults met on the way; may be sent to other processes."""

    def __init__(self, source: Sequence[ReasoningTree], order: grain.MapDataset, first: int, places: Callable):
        self.source, self.order, self.first, self.places = source, order, first, places

    def __call__(self, step: int) -> tuple[int, list[ReasoningTree | None], dict[int, str]]:
        trees: list[ReasoningTree | None] = []
        faults: dict[int, str] = {}
        for index in self.places(self.order[int(step) - self.first]):
            if isinstance(self.source, RecordTrees):
                tree, found = self.source.read(int(index))
                faults |= found
            else:
                tree = self.source[int(index)]
            trees.append(tree)
        return int(step), trees, faults


def _places(accumulate: int, buffers: int, mine: tuple[int, ...], questions: np.ndarray) -> np.ndarray:
    """Those of an update's questions that stand in the buffers `mine`."""
    return questions.reshape(accumulate, buffers, -1)[:, mine].ravel()


def step_batches(
    source: Sequence[ReasoningTree],
    pack: PackConfig,
    config: BatchConfig,
    start: int,
    stop: int,
    first: int = 0,
    buffers: int = 1,
    mine: Sequence[int] | None = None,
    name: str = "batches",
    work: Callable[[ReasoningTree], float] | None = None,
    nothing: VisionInputs | Features | None = None,
) -> Iterator[StepBatch]:
    """Batches of the updates `start .. stop-1`, questions drawn without replacement in an order that each epoch shuffles.

    Which questions an update reads depends on its number alone. Of several processes each reads and packs those of its own
    buffers; they tell each other their sizes, so that all pack into the same shape.

    Args:
      source: trees by index; read from a thread, or from other processes (`BatchConfig.workers`) where they are made of
        records when read.
      pack: static shapes.
      config: batch size and order.
      start: the first update wanted; the batches before it are not computed.
      stop: where to end.
      first: the update at which `source` began to be read (the start of its round).
      buffers: over which the questions of a micro-batch are spread, one or more per device.
      mine: the buffers that this process packs; None for all. `record_ids` and `counters` are those of the whole batch.
      name: tells the iterators of a job apart.
      work: of a tree, in operations; their sum becomes the counter `flops`.
      nothing: what no images look like, for batches without any in this process (see `trees.pack_trees`).

    Raises:
      BrokenRecordsError: while iterating, once more records were found broken than the data may have.
    """
    per_step = config.trees * config.accumulate
    order = grain.MapDataset.range(len(source)).shuffle(seed=config.seed).repeat().batch(per_step)

    mine = tuple(range(buffers) if mine is None else mine)
    count = config.accumulate * len(mine)
    stored = source.trees if isinstance(source, EncodedTrees) else source
    broken: dict[int, str] = {}

    def make(read: tuple[int, list[ReasoningTree | None], dict[int, str]]) -> StepBatch:
        step, found, faults = read
        if isinstance(stored, RecordTrees):
            # All processes learn of all faults, and so end at the same update.
            met = dict(x for part in _everywhere(f"{name}/broken", step, mine, [*faults.items()]) for x in part)
            for index in met.keys() - broken.keys():
                logging.warning("broken, the next record takes its place: %s", met[index])
            broken.update(met)
            whole = all(tree is not None for tree in found)
            check_broken(broken, stored.records.max_broken if whole else 0)
        trees = [tree for tree in found if tree is not None]
        if isinstance(source, EncodedTrees):
            trees = [source.encoded(tree) for tree in trees]
        trees = [trees[i] for i in balance([tree.tokens for tree in trees], count)]
        shapes = _everywhere(f"{name}/shape", step, mine, pack_shape(trees, pack, buffers=count))
        batch, counters = pack_trees(trees, pack, buffers=count, shape=PackShape.covering(shapes), nothing=nothing)
        if work is not None:
            counters["flops"] = sum(map(work, trees))
        if isinstance(stored, RecordTrees):
            counters["broken"] = len(faults)
        split = jax.tree.map(lambda x: x.reshape(config.accumulate, len(x) // config.accumulate, *x.shape[1:]), batch)
        told = _everywhere(f"{name}/read", step, mine, ([tree.trunk.record_id for tree in trees], counters))
        total = {key: sum(part[key] for _, part in told) for key in counters}
        return StepBatch(step, split, [record_id for ids, _ in told for record_id in ids], total)

    steps = grain.MapDataset.range(start, stop)
    steps = steps.map(_Reader(stored, order, first, functools.partial(_places, config.accumulate, buffers, mine)))
    threads = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2)
    if not config.workers or not isinstance(stored, RecordTrees):
        return iter(steps.map(make).to_iter_dataset(threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own, in notebooks and tests, too
    # Workers read; what asks other hosts, and packs, stays in this process, a thread ahead of the update.
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
    read = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(options)
    return iter(grain.experimental.ThreadPrefetchIterDataset(read.map(make), prefetch_buffer_size=2))


def _everywhere(name: str, step: int, mine: tuple[int, ...], value: Any) -> list[Any]:
    """`value` of every process; those that pack the same buffers say the same, which counts once."""
    said = {tuple(buffers): value for buffers, value in distributed.exchange(name, int(step), (mine, value))}
    return [said[buffers] for buffers in sorted(said)]


class EncodedTrees(Sequence[ReasoningTree]):
    """Trees whose images are encoded when a tree is read, or were before."""

    def __init__(self, trees: Sequence[ReasoningTree], features: FeatureCache):
        self.trees, self._features = trees, features

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index):
        return self.encoded(self.trees[index])

    def encoded(self, tree: ReasoningTree) -> ReasoningTree:
        """The tree with the features of its images."""
        encoded = self._features(tree.trunk.encoded)
        return dataclasses.replace(tree, trunk=dataclasses.replace(tree.trunk, encoded=encoded))


class DemonstrationTrees(Sequence[ReasoningTree]):
    """Trunks without branches, made when read: (record, steps, reply) triples as supervised examples."""

    def __init__(self, demonstrations: Sequence, processor: Processor):
        self._demonstrations, self._processor = demonstrations, processor

    def __len__(self) -> int:
        return len(self._demonstrations)

    def __getitem__(self, index):
        one = self._demonstrations[index]
        return ReasoningTree(render_trunk(one.record, one.steps, one.reply, self._processor), ())
