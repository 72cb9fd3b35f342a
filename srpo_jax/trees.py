"""Reasoning trees: one trunk, many branches, and their packing into static shapes.

On the host a `ReasoningTree` is a `Trunk` (prompt, reference path, reference reply) with `Branch`es that leave it at the ends
of its steps. On the device a `TreeBatch` holds several trees in the layout of the comb: trunks as ordinary sequences, branches
packed several per row. Token ids are the record; text is never tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from srpo_jax.inputs import Array, Encoded, Inputs, batch_inputs, pad_to

FAVOURABLE, UNFAVOURABLE, UNKNOWN = 1, 0, -1


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Prompt, reference path and reference reply of one record, tokenised segment by segment.

    Attributes:
      record_id: the record that it was made from.
      encoded: the whole trunk, image included.
      ends: `e_0 .. e_S`, the number of trunk tokens in each prefix; `e_0` is the end of the generation prompt.
      unsafe_reply: tokens of the reply segment with the record's unsafe reply, if it has one.
    """

    record_id: str
    encoded: Encoded
    ends: tuple[int, ...]
    unsafe_reply: np.ndarray | None = None

    @property
    def prefixes(self) -> range:
        """The proper prefixes 0 .. S-1, from which branches start."""
        return range(len(self.ends) - 1)

    @property
    def path(self) -> np.ndarray:
        """int32[r]: the tokens of reference path and reply."""
        return self.encoded.tokens[self.ends[0] :]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One continuation of a prefix.

    Attributes:
      prefix: index i of the prefix it continues.
      tokens: int32[n], n >= 1, up to and including end-of-turn where the model reached it.
      logprobs: float32[n] under the raw policy (temperature 1, no truncation) that sampled it.
      status: status of the parsed path, prefix and branch together (`paths.Status`), or "judge_failed".
      verdict: True favourable, False unfavourable, None unknown.
      reason: the judge's reason, for people.
      on_policy: False for substitutes that no policy sampled.
      refused: whether the judge says that the answer declines the request; None if it does not say.
    """

    prefix: int
    tokens: np.ndarray
    logprobs: np.ndarray
    status: str
    verdict: bool | None
    reason: str = ""
    on_policy: bool = True
    refused: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReasoningTree:
    """A trunk and the branches explored from it."""

    trunk: Trunk
    branches: tuple[Branch, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; floats survive exactly. The image stays with the record."""
        return {
            "record_id": self.trunk.record_id,
            "tokens": self.trunk.encoded.tokens.tolist(),
            "ends": list(self.trunk.ends),
            "branches": [
                {
                    "prefix": b.prefix,
                    "tokens": b.tokens.tolist(),
                    "logprobs": [float(x) for x in b.logprobs],
                    "status": b.status,
                    "verdict": b.verdict,
                    "reason": b.reason,
                }
                for b in self.branches
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], trunk: Trunk) -> ReasoningTree:
        """Inverse of `to_json`, given the trunk made from the same record.

        Raises:
          ValueError: the stored tokens are not those of `trunk`: the record, the grammar or the tokenizer has changed.
        """
        if data["tokens"] != trunk.encoded.tokens.tolist() or tuple(data["ends"]) != trunk.ends:
            raise ValueError(
                f"stored tree of record {data['record_id']!r} has another trunk than the record now gives: the record, "
                "the path grammar or the tokenizer changed; explore again into a new work directory"
            )
        branches = tuple(
            Branch(
                prefix=b["prefix"],
                tokens=np.asarray(b["tokens"], np.int32),
                logprobs=np.asarray(b["logprobs"], np.float32),
                status=b["status"],
                verdict=b["verdict"],
                reason=b["reason"],
            )
            for b in data["branches"]
        )
        return ReasoningTree(trunk, branches)


class Rows(NamedTuple):
    """Inputs of branches, several per row.

    Attributes:
      tokens: int32[B, N, R].
      segments: int32[B, N, R], the branch (0 .. M-1) of each token, -1 for padding.
      limits: int32[B, N, R], how many trunk tokens the token sees.
      positions: int32[B, N, R], its position id (the same in time, height and width).
    """

    tokens: Array
    segments: Array
    limits: Array
    positions: Array


class TreeBatch(NamedTuple):
    """Trees in static shapes. `r` tokens of path and reply are padded to `A`, branches to `M`, their tokens to `L`.

    Attributes:
      trunk: the trunks, [B, T].
      path_start: int32[B], `e_0`.
      path_targets: int32[B, A], tokens of path and reply; target `a` is predicted by trunk token `path_start - 1 + a`.
      path_lengths: int32[B], `r`.
      rows: the branches' inputs, [B, N, R]; all tokens but the last.
      first: int32[B, M], the trunk token that predicts the branch's first token.
      targets: int32[B, M + N R], the token that `first` or the flattened row token predicts (0 where none).
      slots: int32[B, M, L], where in `targets` the branch's tokens stand.
      tokens: int32[B, M, L], the branch's tokens.
      lengths: int32[B, M], tokens of the branch, 0 for padding.
      prefixes: int32[B, M], prefix index, -1 for padding.
      prefix_lengths: int32[B, M], `e_i - e_0`, path tokens in the branch's prefix.
      verdicts: int8[B, M], 1 favourable, 0 unfavourable, -1 padding. SRPO's loss reads `pairs` alone; this is for losses
        that weigh or rank single branches.
      pairs: bool[B, M, M], [b+, b-] where favourable b+ is compared with unfavourable b-.
      weight: float32[B], 1 for a question, 0 for a padding tree.
    """

    trunk: Inputs
    path_start: Array
    path_targets: Array
    path_lengths: Array
    rows: Rows
    first: Array
    targets: Array
    slots: Array
    tokens: Array
    lengths: Array
    prefixes: Array
    prefix_lengths: Array
    verdicts: Array
    pairs: Array
    weight: Array


Ladder = tuple[int, ...]
PATCHES: Ladder = tuple(64 << k for k in range(10))
"""Vision patches in powers of two of the released checkpoints' window of 64."""


def bucket(size: int, ladder: Ladder, what: str) -> int:
    """The smallest step of `ladder` that holds `size`; ValueError names `what` if none does."""
    for step in ladder:
        if size <= step:
            return step
    raise ValueError(f"{what}: {size} exceeds the largest bucket {ladder[-1]}; extend the ladder or shorten the input")


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Static shapes and pair selection.

    Each size is a ladder of allowed values, ascending. `row` must hold the longest branch less one token.

    Attributes:
      trunk: trunk tokens T.
      path: tokens of path and reply A.
      rows: rows per tree N.
      row: tokens per row R, one value.
      branches: branches per tree M.
      branch: tokens of a branch L, substitutes included.
      patches: vision patches per tree; None pads to the largest of the batch.
      unknown: what truncated, looping or malformed branches count as, "drop" or "unfavourable". A branch whose judge failed
        is always dropped.
      max_pairs: pairs kept per prefix, None for all.
      substitutes: give one-sided prefixes the reference's own continuation (favourable) or its path with the unsafe reply.
        They are off-policy.

    Raises:
      ValueError: a ladder that does not ascend, no room in a row, or an option that is not one of those above.
    """

    trunk: Ladder
    path: Ladder
    rows: Ladder
    row: int
    branches: Ladder
    branch: Ladder
    patches: Ladder | None = None
    unknown: str = "drop"
    max_pairs: int | None = None
    substitutes: bool = False

    def __post_init__(self):
        if self.unknown not in ("drop", "unfavourable"):
            raise ValueError(f"unknown={self.unknown!r}: use 'drop' or 'unfavourable'")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs={self.max_pairs}: keep at least one pair, or None for all")
        if self.row < 1:
            raise ValueError(f"row={self.row}: a row holds at least one token")
        for name in ("trunk", "path", "rows", "branches", "branch", "patches"):
            ladder = getattr(self, name)
            if ladder is not None and (not ladder or list(ladder) != sorted(set(ladder))):
                raise ValueError(f"{name}={tuple(ladder)}: give at least one size, ascending")


def verdict_of(branch: Branch, unknown: str = "drop") -> int:
    """FAVOURABLE, UNFAVOURABLE or UNKNOWN, after the policy for branches without a verdict."""
    if branch.verdict is not None:
        return FAVOURABLE if branch.verdict else UNFAVOURABLE
    malformed = branch.status not in ("ok", "judge_failed")
    return UNFAVOURABLE if malformed and unknown == "unfavourable" else UNKNOWN


def usable_branches(tree: ReasoningTree, config: PackConfig) -> tuple[list[Branch], list[int], dict[str, int]]:
    """Distinct branches with a known verdict, their verdicts, and how many were merged or dropped.

    Branches with the same tokens at the same prefix are one branch. If their judges disagree, it is unknown.
    """
    merged: dict[tuple[int, bytes], tuple[Branch, set[int]]] = {}
    for branch in tree.branches:
        key = branch.prefix, branch.tokens.tobytes()
        merged.setdefault(key, (branch, set()))[1].add(verdict_of(branch, config.unknown))
    kept = [(b, v.pop()) for b, v in merged.values() if len(v) == 1]
    kept = [(b, v) for b, v in kept if v != UNKNOWN]
    if config.substitutes:
        kept += _substitutes(tree.trunk, kept)
    counts = {"merged": len(tree.branches) - len(merged), "dropped": len(merged) - sum(b.on_policy for b, _ in kept)}
    return [b for b, _ in kept], [v for _, v in kept], counts


def check_trunks(trunks: Iterable[Trunk], pack: PackConfig, k: int = 0, max_tokens: int = 0) -> None:
    """Refuses trunks that no batch of an update could hold, before hours go into exploring them.

    Args:
      trunks: of all records; read once.
      pack: the shapes.
      k: branches that exploration makes per prefix; 0 without exploration.
      max_tokens: longest of them. With substitutes, rows must hold both in the worst mixture.

    Raises:
      ValueError: names the record, the size and the ladder.
    """
    for trunk in trunks:
        _bucket_of(trunk, len(trunk.encoded.tokens), pack.trunk, "trunk tokens (pack.trunk)")
        _bucket_of(trunk, len(trunk.path), pack.path, "tokens of path and reply (pack.path)")
        if pack.patches and patches_of(trunk):
            _bucket_of(trunk, patches_of(trunk), pack.patches, "vision patches (pack.patches)")
        if k and pack.substitutes:
            steps = trunk.ends[-1] - trunk.ends[0]
            unsafe = 0 if trunk.unsafe_reply is None else steps + len(trunk.unsafe_reply)
            longest = max(len(trunk.path), unsafe, max_tokens)
            _bucket_of(trunk, longest, pack.branch, "tokens of a substitute (pack.branch)")
            _bucket_of(trunk, longest - 1, (pack.row,), "tokens of a substitute in a row (pack.row)")
            rows = rows_needed((k + 1) * len(trunk.prefixes), longest, pack.row)
            _bucket_of(trunk, rows, pack.rows, "rows of branches and substitutes (pack.rows)")


def rows_needed(count: int, longest: int, row: int) -> int:
    """Rows that hold any `count` branches of at most `longest` tokens; first fit fills all but the last that far."""
    return -(-count // max(1, row // max(1, longest - 1)))


def patches_of(trunk: Trunk) -> int:
    """Vision patches of a trunk's images, whole windows."""
    return 0 if trunk.encoded.vision is None else len(trunk.encoded.vision.patches)


def _bucket_of(trunk: Trunk, size: int, ladder: Ladder, what: str) -> int:
    return bucket(size, ladder, f"record {trunk.record_id!r}: {what}")


def _substitutes(trunk: Trunk, kept: Sequence[tuple[Branch, int]]) -> list[tuple[Branch, int]]:
    """Complete off-policy continuations for prefixes whose branches all fell on one side."""
    extra = []
    for i in trunk.prefixes:
        sides = {verdict for branch, verdict in kept if branch.prefix == i}
        if sides == {UNFAVOURABLE}:
            extra.append((_off_policy(i, trunk.encoded.tokens[trunk.ends[i] :], True), FAVOURABLE))
        elif sides == {FAVOURABLE} and trunk.unsafe_reply is not None:
            steps = trunk.encoded.tokens[trunk.ends[i] : trunk.ends[-1]]
            extra.append((_off_policy(i, np.concatenate([steps, trunk.unsafe_reply]), False), UNFAVOURABLE))
    return extra


def _off_policy(prefix: int, tokens: np.ndarray, verdict: bool) -> Branch:
    nothing = np.full(len(tokens), np.nan, np.float32)
    return Branch(prefix, tokens, nothing, "ok", verdict, "substitute from the record", on_policy=False)


def select_pairs(
    prefixes: Sequence[int] | np.ndarray, verdicts: Sequence[int] | np.ndarray, max_pairs: int | None = None
) -> np.ndarray:
    """bool[M, M]: every favourable branch against every unfavourable one of its prefix.

    With `max_pairs`, a prefix keeps pairs along the diagonals of its favourable × unfavourable table, so that every branch
    appears before any appears twice.
    """
    prefix, verdict = np.asarray(prefixes, int), np.asarray(verdicts, int)
    pairs = np.zeros((len(prefix), len(prefix)), bool)
    for i in sorted(set(prefix.tolist())):
        plus = np.flatnonzero((prefix == i) & (verdict == FAVOURABLE))
        minus = np.flatnonzero((prefix == i) & (verdict == UNFAVOURABLE))
        grid = [(a, b) for a in range(len(plus)) for b in range(len(minus))]
        grid.sort(key=lambda ab: ((ab[1] - ab[0]) % len(minus), ab[0]))
        for a, b in grid[:max_pairs]:
            pairs[plus[a], minus[b]] = True
    return pairs


def pack_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences that share each row of `row` tokens. Empty sequences take no room."""
    rows: list[list[int]] = []
    free: list[int] = []
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


def pack_trees(trees: Sequence[ReasoningTree], config: PackConfig, size: int | None = None) -> tuple[TreeBatch, dict]:
    """Packs trees into a `TreeBatch` of `size` trees (default: as many as given); the rest is padding of weight 0.

    Returns:
      The batch in numpy, and counters: merged and dropped branches, prefixes, executed and useful tokens.

    Raises:
      ValueError: a tree that exceeds the largest shapes; names its record.
    """
    size = len(trees) if size is None else size
    trunks = [tree.trunk for tree in trees]
    if not trees or len(trees) > size:
        raise ValueError(f"{len(trees)} trees do not make a batch of {size}")
    parts = [usable_branches(tree, config) for tree in trees]
    for trunk, (branches, _, _) in zip(trunks, parts, strict=True):
        longest = max((len(b.tokens) - 1 for b in branches), default=0)
        _bucket_of(trunk, longest, (config.row,), "tokens of a branch in a row (pack.row)")
    rows = [pack_rows([len(b.tokens) - 1 for b in branches], config.row) for branches, _, _ in parts]
    shape = _shape(trunks, [p[0] for p in parts], rows, config)
    packed = [_pack_one(t, b, v, r, shape, config) for t, (b, v, _), r in zip(trees, parts, rows, strict=True)]
    packed += [_padding_tree(packed[0])] * (size - len(trees))
    examples = [trunk.encoded for trunk in trunks]
    examples += [examples[0]] * (size - len(trees))
    batch = TreeBatch(
        trunk=batch_inputs(examples, shape.trunk, shape.patches or None),
        rows=Rows(*(np.stack(x) for x in zip(*(p.pop("rows") for p in map(dict, packed)), strict=True))),
        **{k: np.stack([p[k] for p in packed]) for k in packed[0] if k != "rows"},
    )
    counters = {key: sum(p[2][key] for p in parts) for key in ("merged", "dropped")}
    counters["prefixes"] = sum(len(tree.trunk.prefixes) for tree in trees)
    counters["tokens"] = sum(len(e.tokens) for e in examples[: len(trees)]) + sum(
        len(b.tokens) - 1 for branches, _, _ in parts for b in branches
    )
    counters["executed_tokens"] = size * (shape.trunk + shape.rows * config.row)
    return batch, counters


class _Shape(NamedTuple):
    trunk: int
    path: int
    patches: int
    rows: int
    branches: int
    branch: int


def _shape(trunks: Sequence[Trunk], branches, rows, config: PackConfig) -> _Shape:
    def fit(sizes: Sequence[int], ladder: Ladder, what: str) -> int:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        return _bucket_of(trunks[largest], sizes[largest], ladder, what)

    patches = [patches_of(t) for t in trunks]
    return _Shape(
        trunk=fit([len(t.encoded.tokens) for t in trunks], config.trunk, "trunk tokens (pack.trunk)"),
        path=fit([len(t.path) for t in trunks], config.path, "tokens of path and reply (pack.path)"),
        patches=fit(patches, config.patches or (max(patches),), "vision patches (pack.patches)") if any(patches) else 0,
        rows=fit([len(r) for r in rows], config.rows, "rows of branches (pack.rows)"),
        branches=fit([len(b) for b in branches], config.branches, "branches (pack.branches)"),
        branch=fit(
            [max((len(x.tokens) for x in b), default=1) for b in branches], config.branch, "branch tokens (pack.branch)"
        ),
    )


def _pack_one(tree, branches, verdicts, rows, shape: _Shape, config: PackConfig) -> dict[str, Any]:
    """The arrays of one tree, without a batch axis."""
    ends, position_ids = tree.trunk.ends, tree.trunk.encoded.positions
    count, length = shape.branches, config.row
    layout = {name: np.zeros((shape.rows, length), np.int32) for name in ("tokens", "limits", "positions")}
    layout["segments"] = np.full((shape.rows, length), -1, np.int32)
    targets = np.zeros(count + shape.rows * length, np.int32)
    slots = np.zeros((count, shape.branch), np.int32)
    tokens = np.zeros((count, shape.branch), np.int32)
    for m, branch in enumerate(branches):
        targets[m], slots[m, 0] = branch.tokens[0], m
        tokens[m, : len(branch.tokens)] = branch.tokens
    for r, members in enumerate(rows):
        start = 0
        for m in members:
            branch, n = branches[m], len(branches[m].tokens) - 1
            here = slice(start, start + n)
            layout["tokens"][r, here], layout["segments"][r, here] = branch.tokens[:-1], m
            layout["limits"][r, here] = ends[branch.prefix]
            layout["positions"][r, here] = position_ids[0, ends[branch.prefix]] + np.arange(n)
            slots[m, 1 : n + 1] = count + r * length + start + np.arange(n)
            targets[count + r * length + start :][:n] = branch.tokens[1:]
            start += n
    prefixes = np.asarray([b.prefix for b in branches], np.int32)
    end_of = np.asarray(ends, np.int32)[prefixes] if len(branches) else prefixes
    pairs = select_pairs(prefixes, verdicts, config.max_pairs)
    return {
        "rows": Rows(**{name: layout[name] for name in Rows._fields}),
        "path_start": np.int32(ends[0]),
        "path_targets": pad_to(tree.trunk.path, shape.path, 0),
        "path_lengths": np.int32(len(tree.trunk.path)),
        "first": pad_to(end_of - 1, count, 0),
        "targets": targets,
        "slots": slots,
        "tokens": tokens,
        "lengths": pad_to(np.asarray([len(b.tokens) for b in branches], np.int32), count, 0),
        "prefixes": pad_to(prefixes, count, 0, -1),
        "prefix_lengths": pad_to(end_of - ends[0], count, 0),
        "verdicts": pad_to(np.asarray(verdicts, np.int8), count, 0, UNKNOWN),
        "pairs": pad_to(pad_to(pairs, count, 0), count, 1),
        "weight": np.float32(1),
    }


def _padding_tree(packed: dict[str, Any]) -> dict[str, Any]:
    """A padding tree: the shapes of `packed`, no branches, weight 0."""
    empty = {k: np.zeros_like(v) for k, v in packed.items() if k != "rows"}
    empty["path_start"] = np.int32(1)
    empty["prefixes"] = np.full_like(packed["prefixes"], -1)
    empty["verdicts"] = np.full_like(packed["verdicts"], UNKNOWN)
    rows = Rows(*(np.zeros_like(a) for a in packed["rows"]))
    return {"rows": rows._replace(segments=np.full_like(rows.segments, -1)), **empty}
