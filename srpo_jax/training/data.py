"""Where the trees of an update come from, and in which order: a pure function of the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax

from srpo_jax import distributed
from srpo_jax.exploration.trunks import render_trunk
from srpo_jax.inputs import Features, VisionInputs
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.processor import Processor
from srpo_jax.trees import PackConfig, PackShape, ReasoningTree, TreeBatch, balance, pack_shape, pack_trees


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

    Raises:
      ValueError: no question or no micro-batch.
    """

    trees: int
    accumulate: int = 1
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if min(self.trees, self.accumulate) < 1:
            raise ValueError(f"trees={self.trees}, accumulate={self.accumulate}: both must be at least 1")


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
      source: trees by index; read from a thread.
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
    """
    per_step = config.trees * config.accumulate
    order = grain.MapDataset.range(len(source)).shuffle(seed=config.seed).repeat().batch(per_step)

    mine = tuple(range(buffers) if mine is None else mine)
    count = config.accumulate * len(mine)

    def make(step: int) -> StepBatch:
        questions = order[int(step) - first].reshape(config.accumulate, buffers, -1)[:, mine].ravel()
        trees = [source[int(i)] for i in questions]
        trees = [trees[i] for i in balance([tree.tokens for tree in trees], count)]
        shapes = _everywhere(f"{name}/shape", step, mine, pack_shape(trees, pack, buffers=count))
        batch, counters = pack_trees(trees, pack, buffers=count, shape=PackShape.covering(shapes), nothing=nothing)
        if work is not None:
            counters["flops"] = sum(map(work, trees))
        split = jax.tree.map(lambda x: x.reshape(config.accumulate, len(x) // config.accumulate, *x.shape[1:]), batch)
        read = _everywhere(f"{name}/read", step, mine, ([tree.trunk.record_id for tree in trees], counters))
        total = {key: sum(part[key] for _, part in read) for key in counters}
        return StepBatch(int(step), split, [record_id for ids, _ in read for record_id in ids], total)

    steps = grain.MapDataset.range(start, stop).map(make)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2)))


def _everywhere(name: str, step: int, mine: tuple[int, ...], value: Any) -> list[Any]:
    """`value` of every process; those that pack the same buffers say the same, which counts once."""
    said = {tuple(buffers): value for buffers, value in distributed.exchange(name, int(step), (mine, value))}
    return [said[buffers] for buffers in sorted(said)]


class EncodedTrees(Sequence[ReasoningTree]):
    """Trees whose images are encoded when a tree is read, or were before."""

    def __init__(self, trees: Sequence[ReasoningTree], features: FeatureCache):
        self._trees, self._features = trees, features

    def __len__(self) -> int:
        return len(self._trees)

    def __getitem__(self, index):
        tree = self._trees[index]
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
