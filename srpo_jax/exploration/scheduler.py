"""How trees flow through the engine: requests wait, take the places of finished trees, and leave as samples."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from srpo_jax import observe, sharding
from srpo_jax.exploration.engine import (
    EngineShape,
    EngineState,
    Samples,
    Trees,
    decode,
    prefill,
    start,
    state_shardings,
)
from srpo_jax.exploration.sampler import SampleConfig
from srpo_jax.inputs import Encoded, Features, PackedInputs, PrefillShape, VisionInputs, pack_inputs
from srpo_jax.models.config import VisionConfig
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.geometry import empty_vision
from srpo_jax.models.policy import Policy

TICKS = 64
"""Tokens between two looks of the host: finished trees leave, and can be stored, at least as often."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Branches wanted of one trunk.

    Attributes:
      trunk: only tokens below the largest limit matter.
      limits: int32[P], the prefix lengths from which branches start.
      prefixes: int32[M], which of them each branch continues. Branches start in this order: the longest first wastes least.
      keys: the branches' random keys [M].
    """

    trunk: Encoded
    limits: np.ndarray
    prefixes: np.ndarray
    keys: jax.Array


def prefill_shape(sequences: int, longest: int, most_patches: int, vision: VisionConfig) -> PrefillShape:
    """The shape of a prefill of `sequences` trunks, with room for half of them at the largest size: most are smaller.

    Args:
      sequences: trunks of a prefill.
      longest: room for the longest trunk, at least its tokens.
      most_patches: room for the largest images, at least their patches.
      vision: says how patches make windows and features.
    """
    half = -(-sequences // 2)
    windows = -(-half * most_patches // vision.window_patches)
    return PrefillShape(sequences, longest, half * longest, most_patches, windows * vision.window_patches)


def sample(
    policy: Policy,
    params: Any,
    requests: Iterable[Request],
    shape: EngineShape,
    config: SampleConfig,
    features: FeatureCache | None = None,
) -> Iterator[tuple[int, Samples]]:
    """Samples the branches of all requests, in any number.

    With parameters on a mesh, trees are split over its data axes; `shape.trees` must be a multiple of their size. Of several
    processes each gives requests of its own, all call together, and each gets its own back.

    Args:
      policy: whose module to use.
      params: the parameters; with `shape.gather` a copy of what `fsdp` splits lies beside them until the last tree is done.
      requests: read as places become free, a few ahead.
      shape: static sizes that hold every request.
      config: how tokens are drawn.
      features: of images under the tower of `params`; None encodes them in the prefill.

    Yields:
      The number of a request and its `Samples` without the batch axis, numpy, as trees finish.

    Raises:
      ValueError: a request that does not fit the shape.
    """
    mesh = sharding.mesh_of(params)
    places = _Places(shape, mesh)
    queue = _Queue(requests, shape, places.lanes, features)
    nothing = empty_vision(policy.config.vision) if features is None else features.nothing
    if not queue and jax.process_count() == 1:
        return  # of several processes, others may have requests
    if shape.gather and mesh is not None:
        params = jax.device_put(params, sharding.gathered_shardings(params, mesh))
    state = start(policy.graphdef, params, shape, config, mesh)
    hungry = active = True
    while hungry or active:
        if hungry:
            state = prefill(policy.graphdef, params, state, *places.to_device(places.load(queue, nothing)), mesh)
        appetite = places.to_device(places.appetite(len(queue)))
        state, pulse = decode(policy.graphdef, params, state, appetite, config, mesh, TICKS)
        hungry, active = bool(pulse.hungry), bool(pulse.active)
        observe.count("decode_places", int(pulse.ticks) * len(places.held) * shape.width)
        if done := places.finished(sharding.to_local(pulse.busy)):
            samples = jax.tree.map(sharding.to_local, state.samples)
            for place, number, count in done:
                observe.count("decoded_tokens", int(samples.lengths[place, :count].sum()))
                yield number, jax.tree.map(lambda x, place=place, count=count: x[place, :count], samples)


def program_shapes(
    graphdef: nnx.GraphDef,
    params: Any,
    shape: EngineShape,
    config: SampleConfig,
    nothing: VisionInputs | Features,
    mesh: Mesh,
) -> tuple[EngineState, tuple[PackedInputs, Trees, np.ndarray]]:
    """Shapes and shardings of what `prefill` and `decode` take beside parameters: the state, and a pack with its trees.

    `nothing` tells whether the pack holds patches or features (see `inputs.pack_vision`).
    """
    state = jax.eval_shape(lambda p: start(graphdef, p, shape, config, mesh), params)
    group = (pack_inputs([], shape.pack, nothing), _trees([], shape), np.zeros(shape.pack.sequences, np.int32))
    parts, split = sharding.batch_parts(mesh), sharding.batch_sharding(mesh)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, state_shardings(state, mesh)
    )
    return placed, jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, *x.shape), x.dtype, sharding=split), group)


class _Queue:
    """Requests that wait, `ahead` of them read; a request is cut to what its branches see."""

    def __init__(
        self, requests: Iterable[Request], shape: EngineShape, ahead: int, features: FeatureCache | None = None
    ):
        self.source, self.shape, self.ahead, self.features = enumerate(requests), shape, ahead, features
        self.waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self.fill()

    def __len__(self) -> int:
        return len(self.waiting)

    def fill(self) -> None:
        for number, request in itertools.islice(self.source, self.ahead - len(self.waiting)):
            self.waiting.append((number, self._checked(number, request)))

    def _checked(self, number: int, request: Request) -> Request:
        shape, trunk = self.shape, request.trunk.prefix(int(request.limits.max()))
        sizes = {
            "trunk tokens": (len(trunk.tokens), shape.pack.longest),
            "vision patches": (trunk.patches, shape.pack.most_patches),
            "branches": (len(request.prefixes), shape.branches),
            "prefixes": (len(request.limits), shape.prefixes),
        }
        for name, (size, room) in sizes.items():
            if size > room:
                raise ValueError(f"request {number}: {size} {name} exceed the engine's {room}; give it a larger shape")
        return dataclasses.replace(request, trunk=self.features(trunk) if self.features else trunk)

    def take(self, pack: PrefillShape, most: int) -> list[tuple[int, Request]]:
        """The next requests, in order, as many as fit one prefill of `pack`; `most` at most."""
        taken: list[tuple[int, Request]] = []
        while len(taken) < most and self.waiting:
            if not pack.holds([*(r.trunk for _, r in taken), self.waiting[0][1].trunk]):
                break
            taken.append(self.waiting.popleft())
        self.fill()
        return taken


class _Places:
    """Which tree stands where, in this process's part of the engine: groups of places, one for each share of the data axes."""

    def __init__(self, shape: EngineShape, mesh: Any):
        groups, here = (1, 1) if mesh is None else (sharding.batch_parts(mesh), len(sharding.local_parts(mesh)))
        if here * jax.process_count() != groups:
            raise ValueError(f"{groups} shares of the mesh are not held evenly by {jax.process_count()} processes")
        if shape.trees % groups:
            raise ValueError(
                f"trees={shape.trees} that decode together cannot be split over {groups} shares of the mesh"
            )
        self.shape, self.mesh = shape, mesh
        self.groups, self.size = here, shape.trees // groups
        self.lanes = self.groups * shape.pack.sequences
        self.held: list[tuple[int, int] | None] = [None] * (self.groups * self.size)

    def load(self, queue: _Queue, nothing: VisionInputs | Features) -> tuple[PackedInputs, Trees, np.ndarray]:
        """Arguments of `prefill`, on the host: the next requests for the empty places."""
        parts = []
        for group in range(self.groups):
            here = range(group * self.size, (group + 1) * self.size)
            empty = [place for place in here if self.held[place] is None]
            taken = queue.take(self.shape.pack, min(len(empty), self.shape.pack.sequences))
            places = np.full(self.shape.pack.sequences, self.size, np.int32)
            for lane, (place, (number, request)) in enumerate(zip(empty, taken, strict=False)):
                self.held[place] = number, len(request.prefixes)
                places[lane] = place - here.start
            requests = [request for _, request in taken]
            packed = pack_inputs([r.trunk for r in requests], self.shape.pack, nothing)
            parts.append((packed, _trees(requests, self.shape), places))
        return jax.tree.map(lambda *x: np.stack(x), *parts)

    def appetite(self, waiting: int) -> np.ndarray:
        """float32[local B]: what an empty place adds; a full prefill, all that wait, or all places make 1."""
        return np.full(len(self.held), 1 / min(self.lanes, waiting, len(self.held)) if waiting else 0, np.float32)

    def finished(self, busy: np.ndarray) -> list[tuple[int, int, int]]:
        """(place, number of the request, branches) of the trees that are done, whose places are empty from now on."""
        done = [(i, *held) for i, held in enumerate(self.held) if held is not None and not busy[i]]
        for place, *_ in done:
            self.held[place] = None
        return done

    def to_device(self, tree: Any) -> Any:
        """Host arrays, this process's part of axis 0, as device arrays."""
        return tree if self.mesh is None else sharding.from_local(tree, sharding.batch_sharding(self.mesh))


def _trees(requests: list[Request], shape: EngineShape) -> Trees:
    """`Trees` [n] of one pack on the host; `openings` holds where in the pack each prefix ends."""
    n, p, m = shape.pack.sequences, shape.prefixes, shape.branches
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    openings, limits, starts = (np.zeros((n, p), np.int32) for _ in range(3))
    prefixes, keys = np.zeros((n, m), np.int32), np.zeros((n, m, *key.shape), key.dtype)
    counts = np.zeros(n, np.int32)
    begin = 0
    for i, request in enumerate(requests):
        count = len(request.prefixes)
        for j, limit in enumerate(request.limits):
            openings[i, j], limits[i, j] = begin + limit - 1, limit
            starts[i, j] = request.trunk.prefix(int(limit)).next_position
        prefixes[i, :count], counts[i] = request.prefixes, count
        keys[i, :count] = jax.random.key_data(request.keys)
        begin += len(request.trunk.tokens)
    return Trees(openings, limits, starts, prefixes, keys, counts)
