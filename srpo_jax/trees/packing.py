"""Trees in static shapes, with next to no padding.

A buffer holds one or several trees, cut into rows of R tokens. A tree's rows are consecutive: first its trunk, then its
branches, first-fit decreasing into what is free, the rest of the trunk's last row included. Of a tree with a trunk of six
tokens, branch a at prefix 4 (inputs a1 a2 a3) and branches b, c at prefix 5 (b1 b2, c1), rows of four tokens look like

              tokens          limits        segments (0: trunk, m + 1: branch m, -1: padding)
    row 0   t1 t2 t3 t4     0  0  0  0     0  0  0  0
    row 1   t5 t6 b1 b2     4  4  5  5     0  0  2  2
    row 2   a1 a2 a3 c1     4  4  4  5     1  1  1  3

A token sees the trunk's tokens below its `limit`, and the tokens up to itself of its own segment in its row. So a piece of the
trunk is to the pieces before it what a branch is to its prefix, and one rule of attention serves both.

SafeKey reads the path once more without the prompt (`PackConfig.key_step`). That is a trunk of its own that begins at e_0, in
rows of its own behind the tree's, whose context are these rows: nothing in it has seen the query, its positions are the path's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from srpo_jax.inputs import (
    Array,
    Features,
    PackedVision,
    VisionInputs,
    feature_offsets,
    nothing_of,
    pack_vision,
    pad_to,
)
from srpo_jax.trees.selection import UNKNOWN, select_pairs, usable_branches
from srpo_jax.trees.shapes import EXTRAS, PackConfig, bucket_of, masked_key, masked_tokens
from srpo_jax.trees.tree import Branch, ReasoningTree


class Rows(NamedTuple):
    """What the decoder reads: G buffers of N rows of R tokens.

    Attributes:
      tokens: int32[G, N, R].
      positions: int32[G, 3, N, R], M-RoPE ids for time, height, width.
      image_slots: int32[G, N, R], index of the feature of its buffer that replaces the token's embedding; -1 for text.
      segments: int32[G, N, R], 0 for the trunk, m + 1 for branch m of the row's tree, -1 for padding.
      limits: int32[G, N, R], how many trunk tokens the token sees beside those of its own segment.
      context: int32[G, N, W], the rows that hold the trunk of the row's tree, in order; of W rows, a short trunk's are fewer,
        and no limit reaches into the others.
    """

    tokens: Array
    positions: Array
    image_slots: Array
    segments: Array
    limits: Array
    context: Array


class TreeBatch(NamedTuple):
    """B trees in G buffers, B / G in each.

    `r` tokens of path and reply are padded to `A`, branches to `M`, their tokens to `L`: what the loss reads, not what the
    decoder computes.

    Attributes:
      rows: the tokens of all trees, each once; of a branch all but the last.
      vision: the images of each buffer's trees, or their features; None when no tree has one.
      predictors: int32[G, Q], tokens of the buffer (as if its rows were one) whose hidden state predicts a scored token.
      targets: int32[G, Q], that scored token; -1 for padding. A tree's scored tokens stand together: those of path and reply,
        then branch after branch.
      path_slots: int32[B], where in the buffer's `targets` the tree's path begins.
      branch_slots: int32[B, M], where a branch begins.
      path_targets: int32[B, A], tokens of path and reply.
      path_lengths: int32[B], `r`.
      tokens: int32[B, M, L], the branch's tokens.
      lengths: int32[B, M], tokens of the branch, 0 for padding.
      prefixes: int32[B, M], prefix index, -1 for padding.
      prefix_lengths: int32[B, M], `e_i - e_0`, path tokens in the branch's prefix.
      verdicts: int8[B, M], 1 favourable, 0 unfavourable, -1 padding. SRPO's loss reads `pairs` alone; this is for losses
        that weigh or rank single branches.
      counts: int32[B, M], identical samples that the branch stands for, 0 for substitutes and padding.
      sampled: float32[B, M, L], log-probs under the policy that sampled the branch, 0 for substitutes.
      step_lengths: int32[B, M], tokens of the branch's first own step; None unless `PackConfig.extras` asks.
      reference: float32[B, M, L], log-probs under the reference model; None unless `PackConfig.extras` asks.
      key_slots: int32[B], where the key step begins, predicted without the query; None unless `PackConfig.extras` asks.
      key_lengths: int32[B], its tokens, 0 for a path without it; None unless `PackConfig.extras` asks.
      understanding: int32[B, 2, 2], from and to which token of the buffer the tree goes before its key step, with the prompt
        and without it; none for a path without that step. None unless `PackConfig.extras` asks.
      safe: int8[B], 1 for a harmless question, 0 for a risky one, -1 where the record does not say or the path has no key step;
        None unless `PackConfig.extras` asks.
      pairs: bool[B, M, M], [b+, b-] where favourable b+ is compared with unfavourable b-.
      weight: float32[B], 1 for a question, 0 for a padding tree.
    """

    rows: Rows
    vision: PackedVision | Features | None
    predictors: Array
    targets: Array
    path_slots: Array
    branch_slots: Array
    path_targets: Array
    path_lengths: Array
    tokens: Array
    lengths: Array
    prefixes: Array
    prefix_lengths: Array
    verdicts: Array
    counts: Array
    sampled: Array
    step_lengths: Array | None
    reference: Array | None
    key_slots: Array | None
    key_lengths: Array | None
    understanding: Array | None
    safe: Array | None
    pairs: Array
    weight: Array


class _Tree(NamedTuple):
    """A tree and where its pieces go: rows of indices of branches, the trunk's rows first, and rows of the path alone."""

    tree: ReasoningTree
    branches: list[Branch]
    verdicts: list[int]
    rows: list[list[int]]
    masked_rows: int

    @property
    def size(self) -> int:
        """All its rows."""
        return len(self.rows) + self.masked_rows


class PackShape(NamedTuple):
    """Static sizes of a packed batch: rows of context, path tokens, patches of a buffer and of a tree, rows of a buffer,
    branches, branch tokens."""

    context: int
    path: int
    patches: int
    most_patches: int
    rows: int
    branches: int
    branch: int

    @staticmethod
    def covering(shapes: Iterable[Sequence[int]]) -> PackShape:
        """The smallest shape that holds all of `shapes`."""
        return PackShape(*map(max, zip(*shapes, strict=True)))


def pack_rows(lengths: Sequence[int], row: int, taken: Sequence[int] = ()) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences that share each row of `row` tokens. Empty sequences take no room.

    Args:
      lengths: of the sequences.
      row: tokens per row.
      taken: tokens that something else takes of the first rows.
    """
    rows: list[list[int]] = [[] for _ in taken]
    free = [row - n for n in taken]
    for index in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        size = lengths[index]
        if size == 0:
            continue
        if size > row:
            raise ValueError(f"a branch of {size + 1} tokens does not fit into rows of {row}; raise PackConfig.row")
        home = next((r for r, room in enumerate(free) if room >= size), len(rows))
        if home == len(rows):
            rows.append([])
            free.append(row)
        rows[home].append(index)
        free[home] -= size
    return rows


def balance(sizes: Sequence[int], buffers: int) -> list[int]:
    """An order of trees whose consecutive groups, one per buffer and equally many in each, have similar total sizes.

    The largest goes first, always to the group with the least so far that has room.
    """
    groups: list[list[int]] = [[] for _ in range(buffers)]
    for index in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        open_groups = [g for g in groups if len(g) * buffers < len(sizes)]
        min(open_groups, key=lambda g: sum(sizes[i] for i in g)).append(index)
    return [i for group in groups for i in group]


def pack_trees(
    trees: Sequence[ReasoningTree],
    config: PackConfig,
    size: int | None = None,
    buffers: int = 1,
    shape: PackShape | None = None,
    nothing: VisionInputs | Features | None = None,
) -> tuple[TreeBatch, dict]:
    """Packs trees, in order, into a `TreeBatch` of `size` trees (default: as many as given); the rest is padding of weight 0.

    Args:
      trees: at least one.
      config: the shapes.
      size: B.
      buffers: G, a divisor of `size`; one for each device that works on its own trees.
      shape: to pack into; None takes `pack_shape`. The parts of one batch are packed into `PackShape.covering` of theirs.
      nothing: see `inputs.pack_vision`; None takes it from the trees, which tell if one has an image.

    Returns:
      The batch in numpy, and counters: merged, dropped and idle branches, prefixes, executed and useful tokens and patches.

    Raises:
      ValueError: a tree that exceeds the largest shapes; names its record.
    """
    size = len(trees) if size is None else size
    if not trees or len(trees) > size or size % buffers:
        raise ValueError(f"{len(trees)} trees do not make a batch of {size} in {buffers} buffers of equally many")
    parts, counts = _lay_out(trees, config)
    each = size // buffers
    groups = [parts[g * each : (g + 1) * each] for g in range(buffers)]
    shape = shape or _shape(groups, each, config)
    rows, predictors, targets, slots = zip(*(_pack_buffer(g, each, shape, config) for g in groups), strict=True)
    packed = [_pack_tree(part, shape, config) for part in parts]
    packed += [_padding_tree(packed[0])] * (size - len(trees))
    path_slots, branch_slots, *places = (np.concatenate(x) for x in zip(*slots, strict=True))
    extras = dict.fromkeys(EXTRAS)
    extras |= {k: x for k, x in zip(("key_slots", "understanding"), places, strict=True) if k in config.extras}
    batch = TreeBatch(
        rows=Rows(*(np.stack(x) for x in zip(*rows, strict=True))),
        vision=_pack_images(groups, each, shape, nothing),
        predictors=np.stack(predictors),
        targets=np.stack(targets),
        path_slots=path_slots,
        branch_slots=branch_slots,
        **extras | {k: np.stack([p[k] for p in packed]) for k in packed[0]},
    )
    counts["tokens"] = int(np.sum(batch.rows.segments >= 0))
    counts["executed_tokens"] = batch.rows.tokens.size
    if isinstance(batch.vision, PackedVision):
        counts["patches"] = int(np.sum(batch.vision.images > 0))
        counts["executed_patches"] = batch.vision.images.size
    return batch, counts


def _pack_images(
    groups: Sequence[Sequence[_Tree]], each: int, shape: PackShape, nothing: VisionInputs | Features | None
) -> PackedVision | Features | None:
    """The images of each buffer's trees; None where the shape has no room for any."""
    if not shape.patches:
        return None
    examples = [[part.tree.trunk.encoded for part in group] for group in groups]
    nothing = nothing or nothing_of([e for group in examples for e in group])
    if nothing is None:
        raise ValueError("the shape has room for images, but no tree here has one: tell what none look like (nothing=)")
    return pack_vision(examples, each, shape.patches, shape.most_patches, nothing)


def pack_shape(trees: Sequence[ReasoningTree], config: PackConfig, buffers: int = 1) -> PackShape:
    """The shape of a batch of these trees; raises as `pack_trees` does."""
    parts, each = _lay_out(trees, config)[0], len(trees) // buffers
    return _shape([parts[g * each : (g + 1) * each] for g in range(buffers)], each, config)


def _lay_out(trees: Sequence[ReasoningTree], config: PackConfig) -> tuple[list[_Tree], dict[str, int]]:
    """The branches of every tree that count, in rows, and how many were merged and dropped."""
    parts, counters = [], {"merged": 0, "dropped": 0, "idle": 0, "prefixes": 0}
    for tree in trees:
        branches, verdicts, counts = usable_branches(tree, config)
        inputs = [len(b.tokens) - 1 for b in branches]
        bucket_of(tree.trunk, max(inputs, default=0), (config.row,), "tokens of a branch in a row (pack.row)")
        whole, rest = divmod(len(tree.trunk.encoded.tokens), config.row)
        taken = [config.row] * whole + [rest] * (rest > 0)
        masked_rows = -(-masked_tokens(tree.trunk, config) // config.row)
        parts.append(_Tree(tree, branches, verdicts, pack_rows(inputs, config.row, taken), masked_rows))
        for name, count in {**counts, "prefixes": len(tree.trunk.prefixes)}.items():
            counters[name] += count
    return parts, counters


def _shape(groups: Sequence[Sequence[_Tree]], each: int, config: PackConfig) -> PackShape:
    parts = [part for group in groups for part in group]

    def fit(size_of, ladder, what: str) -> int:
        largest = max(parts, key=size_of)
        return bucket_of(largest.tree.trunk, size_of(largest), ladder, what)

    fullest = max(groups, key=lambda group: sum(p.size for p in group))
    average = -(-sum(p.size for p in fullest) // each)
    largest = max(fullest, key=lambda p: p.size).tree.trunk
    patches, most = _patches(groups, each, config)
    trunk = fit(lambda p: len(p.tree.trunk.encoded.tokens), config.trunk, "trunk tokens (pack.trunk)")
    return PackShape(
        context=-(-trunk // config.row),
        path=fit(lambda p: len(p.tree.trunk.path), config.path, "tokens of path and reply (pack.path)"),
        patches=patches,
        most_patches=most,
        rows=each * bucket_of(largest, average, config.rows, "rows of trunk and branches (pack.rows)"),
        branches=fit(lambda p: len(p.branches), config.branches, "branches (pack.branches)"),
        branch=fit(
            lambda p: max((len(b.tokens) for b in p.branches), default=1), config.branch, "branch tokens (pack.branch)"
        ),
    )


def _patches(groups: Sequence[Sequence[_Tree]], each: int, config: PackConfig) -> tuple[int, int]:
    """Room for patches: of a buffer, on average over its trees, and of one tree."""
    trunks = [[part.tree.trunk for part in group] for group in groups]
    fullest = max(sum(t.encoded.patches for t in group) for group in trunks)
    largest = max((t for group in trunks for t in group), key=lambda t: t.encoded.patches)
    if config.patches is None or not fullest:
        return fullest, largest.encoded.patches
    most, average = (
        bucket_of(largest, n, config.patches, "vision patches (pack.patches)")
        for n in (largest.encoded.patches, -(-fullest // each))
    )
    return max(most, each * average), most


def _pack_buffer(group: Sequence[_Tree], each: int, shape: PackShape, config: PackConfig):
    """Rows, predictors, targets and slots of one buffer, without an axis of buffers."""
    row = config.row
    rows = Rows(
        tokens=np.zeros((shape.rows, row), np.int32),
        positions=np.zeros((3, shape.rows, row), np.int32),
        image_slots=np.full((shape.rows, row), -1, np.int32),
        segments=np.full((shape.rows, row), -1, np.int32),
        limits=np.zeros((shape.rows, row), np.int32),
        context=np.zeros((shape.rows, shape.context), np.int32),
    )
    path_slots, branch_slots = np.zeros(each, np.int32), np.zeros((each, shape.branches), np.int32)
    key_slots, understanding = np.zeros(each, np.int32), np.zeros((each, 2, 2), np.int32)
    scored: list[np.ndarray] = [np.zeros((2, 0), np.int32)]
    count = first = 0
    offsets = feature_offsets([part.tree.trunk.encoded for part in group])
    for i, (part, offset) in enumerate(zip(group, offsets, strict=True)):
        starts = _fill_rows(part, first, offset, rows, config)
        for begin, end in ((first, first + len(part.rows)), (first + len(part.rows), first + part.size)):
            rows.context[begin:end] = np.minimum(begin + np.arange(shape.context), shape.rows - 1)
        trunk, ends = part.tree.trunk, part.tree.trunk.ends
        pieces = [(ends[0] - 1, ends[0], trunk.path)]  # what predicts the first token, what the others; tokens
        pieces += [(ends[b.prefix] - 1, start, b.tokens) for b, start in zip(part.branches, starts, strict=True)]
        if key := masked_key(trunk, config):
            start = len(part.rows) * row + key[0] - ends[0]
            pieces.append((start - 1, start, trunk.encoded.tokens[slice(*key)]))
        slots = count + np.cumsum([0, *(len(tokens) for _, _, tokens in pieces)])
        for before, start, tokens in pieces:
            predictors = np.concatenate([[before], start + np.arange(len(tokens) - 1)]) + first * row
            scored.append(np.stack([predictors, tokens]).astype(np.int32))
        path_slots[i], branch_slots[i, : len(starts)] = slots[0], slots[1 : len(starts) + 1]
        key_slots[i], count = slots[len(starts) + 1], slots[-1]  # without a key step nothing of it is read
        if step := trunk.step(config.key_step):
            understanding[i] = first * row + np.asarray([[0, step[0]], [ends[0], step[0]]])
        first += part.size
    room = (
        shape.rows * row + each * shape.branches
    )  # every token of the buffer, and what the trunk predicts of branches
    predictors, targets = np.concatenate(scored, axis=1)
    places = path_slots, branch_slots, key_slots, understanding
    return rows, pad_to(predictors, room, 0), pad_to(targets, room, 0, -1), places


def _fill_rows(part: _Tree, first: int, offset: int, rows: Rows, config: PackConfig) -> list[int]:
    """Writes a tree into the rows from `first` on, its features from `offset` on; returns where its branches' inputs begin,
    as if its rows were one."""
    row = config.row

    def put(r: int, at: int, tokens, positions, slots, segment: int, limit: int) -> None:
        here = slice(at, at + len(tokens))
        rows.tokens[first + r, here], rows.positions[:, first + r, here] = tokens, positions
        rows.image_slots[first + r, here] = slots
        rows.segments[first + r, here], rows.limits[first + r, here] = segment, limit

    ends, encoded = part.tree.trunk.ends, part.tree.trunk.encoded
    starts, slots = [0] * len(part.branches), np.where(encoded.image_slots >= 0, encoded.image_slots + offset, -1)
    for r, members in enumerate(part.rows):
        piece = slice(r * row, (r + 1) * row)
        put(r, 0, encoded.tokens[piece], encoded.positions[:, piece], slots[piece], 0, r * row)
        at = len(encoded.tokens[piece])
        for m in members:
            tokens, end = part.branches[m].tokens[:-1], ends[part.branches[m].prefix]
            put(r, at, tokens, encoded.positions[0, end] + np.arange(len(tokens)), -1, m + 1, end)
            starts[m] = r * row + at
            at += len(tokens)
    masked = slice(ends[0], ends[0] + masked_tokens(part.tree.trunk, config))
    path, positions = encoded.tokens[masked], encoded.positions[:, masked]
    for r in range(part.masked_rows):
        piece = slice(r * row, (r + 1) * row)
        put(len(part.rows) + r, 0, path[piece], positions[:, piece], -1, 0, r * row)
    return starts


def _pack_tree(part: _Tree, shape: PackShape, config: PackConfig) -> dict[str, Any]:
    """What the loss reads of one tree, without an axis of trees."""
    branches, trunk = part.branches, part.tree.trunk
    prefixes = np.asarray([b.prefix for b in branches], np.int32)
    ends = np.asarray(trunk.ends, np.int32)
    pairs = select_pairs(prefixes, part.verdicts, config.max_pairs)
    count = shape.branches
    return {
        "path_targets": pad_to(trunk.path, shape.path, 0),
        "path_lengths": np.int32(len(trunk.path)),
        "tokens": _per_token([b.tokens for b in branches], shape, np.int32),
        "lengths": pad_to(np.asarray([len(b.tokens) for b in branches], np.int32), count, 0),
        "prefixes": pad_to(prefixes, count, 0, -1),
        "prefix_lengths": pad_to(ends[prefixes] - ends[0], count, 0),
        "verdicts": pad_to(np.asarray(part.verdicts, np.int8), count, 0, UNKNOWN),
        "counts": pad_to(np.asarray([b.count for b in branches], np.int32), count, 0),
        "sampled": _per_token([b.logprobs if b.count else 0 * b.tokens for b in branches], shape, np.float32),
        **_extras(part, shape, config),
        "pairs": pad_to(pad_to(pairs, count, 0), count, 1),
        "weight": np.float32(1),
    }


def _per_token(values: Sequence[np.ndarray], shape: PackShape, dtype: Any) -> np.ndarray:
    """dtype[M, L]: one row per branch, 0 beyond its tokens."""
    padded = np.zeros((shape.branches, shape.branch), dtype)
    for row, value in zip(padded, values, strict=False):
        row[: len(value)] = value
    return padded


def _extras(part: _Tree, shape: PackShape, config: PackConfig) -> dict[str, Any]:
    """The fields of `EXTRAS` that are wanted, save for slots; ValueError names a record whose branches do not tell."""
    wanted, trunk = config.extras, part.tree.trunk
    told: dict[str, list[Any]] = {
        field: [getattr(b, source) for b in part.branches] for field in wanted if (source := EXTRAS[field])
    }
    for field, values in told.items():
        if any(value is None for value in values):
            raise ValueError(
                f"record {trunk.record_id!r}: a branch has no {EXTRAS[field]}, of which TreeBatch.{field} is made; "
                "see training.annotate"
            )
    extras: dict[str, Any] = {}
    if "key_lengths" in wanted:
        begin, end = trunk.step(config.key_step) or (0, 0)
        extras["key_lengths"] = np.int32(end - begin)
    if "safe" in wanted:
        known = trunk.risky is not None and trunk.step(config.key_step)
        extras["safe"] = np.int8(not trunk.risky if known else -1)
    if "step_lengths" in told:
        extras["step_lengths"] = pad_to(np.asarray(told["step_lengths"], np.int32), shape.branches, 0)
    if "reference" in told:
        extras["reference"] = _per_token(told["reference"], shape, np.float32)
    return extras


def _padding_tree(packed: dict[str, Any]) -> dict[str, Any]:
    """A padding tree: the shapes of `packed`, nothing in it, weight 0."""
    empty = {k: np.zeros_like(v) for k, v in packed.items()}
    return empty | {name: np.full_like(packed[name], -1) for name in ("prefixes", "verdicts")}
