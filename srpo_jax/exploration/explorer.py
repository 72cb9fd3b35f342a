"""From records to judged trees: sample, judge, join; each step resumable on its own.

A folder of exploration holds two append-only files. `branches.jsonl` has one line per tree as it comes off the device,
`verdicts.jsonl` one line per judged branch. A killed run reads what is there and goes on; nothing is sampled or asked twice.
In a job of several processes each explores whole batches of the records and has files of its own; all read all of them.
`round.json` says what the branches depend on: they are never taken for those of other parameters, settings or records.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from srpo_jax import distributed, observe
from srpo_jax.data.records import Record
from srpo_jax.exploration.adaptive import AdaptiveConfig, Wish, carry_over, wishes, with_branches
from srpo_jax.exploration.engine import EngineShape, Samples
from srpo_jax.exploration.judging import Judge, Pair, Place, is_favourable, known_verdicts, store_verdicts
from srpo_jax.exploration.rounds import ROUND_FILE, claim, origin_of, read_trees
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.files import Store
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.policy import Policy
from srpo_jax.paths import Status, parse
from srpo_jax.trees import Branch, Ladder, ReasoningTree, Trunk, bucket

JUDGE_FAILED = "judge_failed"


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """How trees are explored.

    Attributes:
      k: branches per prefix.
      adaptive: samples that every prefix gets first, of which those whose verdicts disagree get `wave` more at a time, up to
        `k`; 0 samples `k` everywhere at once. See `adaptive`.
      wave: samples at a time after the first.
      max_age: rounds that a branch stays after its own, and counts as a sample; 0 keeps none.
      prefixes: the prefixes that are continued, ascending; None for all. `(0,)` samples `k` whole responses from the root.
      temperature: of sampling; further options of a draw as in `sampler.SampleConfig`.
      max_tokens: token budget of a branch.
      trees: trees that decode together; on a mesh a multiple of its data × fsdp devices.
      width: branches of a tree that decode together; 0 for all. The others wait for a place, so that few places idle
        while the last branches of a tree end.
      prefill: trunks that are prefilled together, per device of data × fsdp.
      trunk: ladder of trunk lengths T; all trunks of a round are kept at the length of the longest.
      patches: ladder of vision patches per tree; None takes the largest of the round.
      gather: gather parameters that `mesh.fsdp` splits once and hold them while exploring, instead of gathering them for every
        token; `mesh.tensor` still splits them. For policies that fit so (docs/scaling.md).
      int8_cache: keep keys and values as int8, half the memory of bfloat16; log-probs move (docs/performance.md).
      favourable: "safe_and_effective", or "safe" alone. A harmless record's branch is favourable iff it is effective.
    """

    k: int = 4
    adaptive: int = 0
    wave: int = 2
    max_age: int = 0
    prefixes: tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    loop_tokens: int = 64
    max_tokens: int = 256
    trees: int = 8
    width: int = 0
    prefill: int = 4
    trunk: Ladder = (256, 512, 1024, 2048, 4096)
    patches: Ladder | None = None
    gather: bool = False
    int8_cache: bool = False
    favourable: str = "safe_and_effective"

    def __post_init__(self):
        if self.favourable not in ("safe_and_effective", "safe"):
            raise ValueError(f"favourable={self.favourable!r}: use 'safe_and_effective' or 'safe'")
        if self.prefixes is not None and (
            not self.prefixes or list(self.prefixes) != sorted(set(self.prefixes)) or not self.prefixes[0] >= 0
        ):
            raise ValueError(f"prefixes={self.prefixes}: give at least one, from 0 on, ascending; or None for all")
        if self.k < 1:
            raise ValueError(f"k={self.k}: it must be at least 1")
        if not 0 <= self.adaptive <= self.k or self.wave < 1 or self.max_age < 0:
            raise ValueError(
                f"adaptive={self.adaptive}, wave={self.wave}, max_age={self.max_age}: adaptive is at most k={self.k} (0: all "
                "at once), wave at least 1, max_age at least 0"
            )
        self.sampling(())

    def waves(self) -> AdaptiveConfig:
        """When a prefix has enough samples: uniform exploration is settled by its first."""
        return AdaptiveConfig(self.adaptive or self.k, self.k, self.wave, self.max_age)

    def prefixes_of(self, trunk: Trunk) -> np.ndarray:
        """int32[P]: the prefixes of a trunk that are continued; ValueError for one that it does not have."""
        chosen = trunk.prefixes if self.prefixes is None else self.prefixes
        if chosen[-1] not in trunk.prefixes:
            raise ValueError(
                f"record {trunk.record_id!r}: explore.prefixes={self.prefixes}, but it has prefixes 0 to {trunk.prefixes[-1]}"
            )
        return np.asarray(chosen, np.int32)

    def sampling(self, stop_ids: tuple[int, ...]) -> SampleConfig:
        """How its branches' tokens are drawn."""
        shared = {field.name for field in dataclasses.fields(SampleConfig)} - {"stop_ids"}
        return SampleConfig(stop_ids=stop_ids, **{name: getattr(self, name) for name in shared})


def explore(
    policy: Policy,
    params: Mapping[str, Any] | None,
    records: Sequence[Record],
    config: ExploreConfig,
    judge: Judge,
    key: jax.Array,
    *,
    round_: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
    trunks: Sequence[Trunk] | None = None,
    features: FeatureCache | None = None,
    earlier: Sequence[ReasoningTree] = (),
) -> list[ReasoningTree]:
    """Explores `k` continuations of every proper prefix (or `config.prefixes`), fewer where verdicts agree, and judges them.

    Args:
      policy: whose module, processor and tokenizer to use.
      params: the parameters to explore with; the same for a whole round. None reads the trees of `folder` and samples none.
      records: with distinct ids.
      config: how to explore.
      judge: called once per branch that has an answer. Stored verdicts are used again under the same `judge_name` alone.
      key: random key of the run; a branch's randomness depends on (key, round, record, prefix, number) alone.
      round_: number of the round.
      folder: where to keep branches and verdicts as they come, and to resume from; None keeps nothing.
      progress: show a progress bar.
      trunks: of the records, in order, where the caller has made them already (`trunks.make_trunk`).
      features: of images under the tower of `params`; None encodes them once per tree.
      earlier: trees of the round before, in order, whose branches stay for `config.max_age` rounds.

    Returns:
      One tree per record, in order.

    Raises:
      ValueError: duplicate record ids, a record that does not fit, a folder explored with other parameters, settings, key
        or records (names what differs), or one that lacks trees where `params` is None.
      TypeError: a judge that returns something else than a verdict.
    """
    by_id = {record.id: record for record in records}
    if len(by_id) != len(records):
        twice = sorted(name for name, n in Counter(record.id for record in records).items() if n > 1)
        raise ValueError(f"record ids are not unique: {twice[:3]}; trees are kept by id, give every record its own")
    trunks = [make_trunk(record, policy.processor) for record in records] if trunks is None else trunks
    _check_trunks(trunks, config)
    if earlier and [tree.trunk.record_id for tree in earlier] != [trunk.record_id for trunk in trunks]:
        raise ValueError("earlier: the trees are of other records than those to explore")
    old = [carry_over(tree, config.waves()) for tree in earlier] or [ReasoningTree(trunk, ()) for trunk in trunks]
    branches, verdicts = Store.open(folder, "branches.jsonl"), Store.open(folder, "verdicts.jsonl")
    with branches, verdicts:
        stored = {line["record_id"] for line in branches.lines}
        if params is None and (missing := by_id.keys() - stored):
            raise ValueError(
                f"{folder} lacks the trees of {len(missing)} records ({sorted(missing)[:3]}), and the parameters that explored "
                "it have been updated since; restore branches.jsonl or start a new work directory"
            )
        if folder is not None:
            origin = origin_of(params, trunks, config, key, round_)
            empty = not stored and not verdicts.lines
            distributed.on_lead(lambda: claim(Path(folder) / ROUND_FILE, origin, empty=empty))
        own, quiet = read_trees(distributed.mine(old), branches.lines), not (progress and distributed.is_lead())
        # Once updates have learned from a round, its verdicts stay as they are, failed ones, too.
        known = known_verdicts(judge, verdicts, failed=params is None)

        def judged(trees: Sequence[ReasoningTree], progress: bool) -> list[ReasoningTree]:
            with observe.span("judge"):
                return _judge_trees(trees, by_id, policy, config, judge, verdicts, known, progress)

        trees, growing = own, True
        shape, round_key = explore_shape(policy, trunks, config), jax.random.fold_in(key, round_)
        title = f"explore round {round_}"
        grow = _Growth(policy, params, config, round_key, shape, branches, title, quiet, features)
        while growing:
            trees = judged(trees, not quiet) if config.adaptive else trees  # its next wave follows from verdicts
            growing = params is not None and distributed.anywhere(grow.wanted(trees))
            if growing:
                with observe.span("explore"):
                    trees = grow.wave(trees)
        trees = judged(trees, not quiet)
        if distributed.process_count() == 1:
            return trees
        trees, _ = read_trees(old, branches.share()), verdicts.share()
        known |= known_verdicts(judge, verdicts, failed=True)
        return judged(trees, False)  # all of them are judged by now


def _check_trunks(trunks: Sequence[Trunk], config: ExploreConfig) -> None:
    """Raises ValueError for one that no bucket holds."""
    for trunk in trunks:
        bucket(_length(trunk, config), config.trunk, f"record {trunk.record_id!r}: trunk tokens (explore.trunk)")
        patches = trunk.encoded.patches
        bucket(patches, config.patches or (patches,), f"record {trunk.record_id!r}: explore.patches")


class _Growth:
    """Samples what this process's trees still want, wave by wave, each branch stored before it is judged."""

    def __init__(self, policy, params, config: ExploreConfig, key, shape, store: Store, title, quiet, features):
        self.config, self.store, self.title, self.quiet = config, store, title, quiet
        self.sample = lambda asked: sample_wishes(policy, params, asked, config, key, shape, features)
        self.stored = {line["record_id"] for line in store.lines}  # trees that have a line, be it without branches

    def wishes(self, tree: ReasoningTree) -> list[Wish]:
        return wishes(tree, self.config.waves(), self.config.prefixes_of(tree.trunk).tolist())

    def wanted(self, trees: Sequence[ReasoningTree]) -> bool:
        """Whether any tree wants branches. One that wants none beside those of earlier rounds is stored all the same: no line
        would mean that it was lost."""
        for tree in trees:
            if tree.trunk.record_id not in self.stored and not self.wishes(tree):
                self._store(tree, ())
        return any(self.wishes(tree) for tree in trees)

    def _store(self, tree: ReasoningTree, branches: tuple[Branch, ...]) -> None:
        after = sum(b.age == 0 for b in tree.branches)
        line = dataclasses.replace(tree, branches=branches).to_json()
        self.store.append(line | ({"after": after} if after else {}))
        self.stored.add(tree.trunk.record_id)

    def wave(self, trees: Sequence[ReasoningTree]) -> list[ReasoningTree]:
        """The trees with the next samples of their prefixes, unjudged."""
        grown, asked = list(trees), [(i, w) for i, tree in enumerate(trees) if (w := self.wishes(tree))]
        done = len(trees) - len(asked)
        with tqdm(total=len(trees), initial=done, desc=self.title, unit="tree", disable=self.quiet) as bar:
            for number, branches in self.sample(w for _, w in asked):
                tree = grown[i := asked[number][0]]
                self._store(tree, branches)
                grown[i] = with_branches(tree, branches)
                bar.update()
        return grown


def _length(trunk: Trunk, config: ExploreConfig) -> int:
    """Trunk tokens that some branch sees."""
    return trunk.ends[config.prefixes_of(trunk)[-1]]


def explore_shape(policy: Policy, trunks: Sequence[Trunk], config: ExploreConfig) -> EngineShape:
    """The engine's sizes for all trunks of a round; those for a part of them may differ, and with them the last bits."""
    prefixes = max(len(config.prefixes_of(trunk)) for trunk in trunks)
    longest = bucket(max(_length(t, config) for t in trunks), config.trunk, "trunk tokens (explore.trunk)")
    most = max(trunk.encoded.patches for trunk in trunks)
    if most and config.patches:
        most = bucket(most, config.patches, "vision patches of a tree (explore.patches)")
    branches = prefixes * config.k
    return EngineShape(
        trees=config.trees,
        width=min(config.width or branches, branches),
        branches=branches,
        prefixes=prefixes,
        pack=prefill_shape(config.prefill, longest, most, policy.config.vision),
        int8=config.int8_cache,
        gather=config.gather,
    )


def sample_trees(
    policy: Policy,
    params: Mapping[str, Any],
    trunks: Iterable[Trunk],
    config: ExploreConfig,
    key: jax.Array,
    shape: EngineShape,
    features: FeatureCache | None = None,
) -> Iterator[ReasoningTree]:
    """Unjudged trees of the trunks, `k` samples everywhere, as they finish; `key` is that of the round, `shape` from
    `explore_shape`."""
    taken: list[ReasoningTree] = []

    def everything() -> Iterator[list[Wish]]:
        for trunk in trunks:
            taken.append(ReasoningTree(trunk, ()))
            prefixes = config.prefixes_of(trunk).tolist()
            yield wishes(taken[-1], AdaptiveConfig(config.k, config.k), prefixes)

    for number, branches in sample_wishes(policy, params, everything(), config, key, shape, features):
        yield dataclasses.replace(taken[number], branches=branches)


def sample_wishes(
    policy: Policy,
    params: Mapping[str, Any],
    asked: Iterable[Sequence[Wish]],
    config: ExploreConfig,
    key: jax.Array,
    shape: EngineShape,
    features: FeatureCache | None = None,
) -> Iterator[tuple[int, tuple[Branch, ...]]]:
    """Unjudged branches, those of one tree at a time as it finishes, with the tree's place in `asked`; the arguments are as in
    `sample_trees`. A branch is the same whatever else is asked for."""
    taken: list[Sequence[Wish]] = []

    def requests() -> Iterator[Request]:
        for wave in asked:
            taken.append(wave)
            trunk = wave[0].tree.trunk
            chosen = config.prefixes_of(trunk)
            prefixes, numbers = (
                np.asarray([getattr(w, name) for w in wave], np.int32) for name in ("prefix", "number")
            )
            places = np.searchsorted(chosen, prefixes).astype(np.int32)
            keys = branch_keys(record_key(key, trunk.record_id), prefixes, numbers)
            yield Request(trunk.encoded, np.asarray(trunk.ends, np.int32)[chosen], places, keys)

    how = config.sampling(policy.processor.stop_ids)
    for number, samples in sample(policy, params, requests(), shape, how, features):
        ones = [jax.tree.map(lambda x, m=m: x[m], samples) for m in range(len(taken[number]))]
        pairs = zip(taken[number], ones, strict=True)
        yield number, tuple(_branch(policy, wish.tree.trunk, wish.prefix, one) for wish, one in pairs)


def _branch(policy: Policy, trunk: Trunk, prefix: int, one: Samples) -> Branch:
    tokens, logprobs = (np.asarray(x)[: int(one.lengths)] for x in (one.tokens, one.logprobs))
    parsed = parse(branch_text(policy, trunk, prefix, tokens), stopped=bool(one.stopped), grammar=GRAMMAR)
    status = Status.LOOP if one.looped else parsed.status
    return Branch(prefix, tokens, logprobs, str(status), None)


def branch_text(policy: Policy, trunk: Trunk, prefix: int, tokens: np.ndarray) -> str:
    """The whole assistant turn: the prefix of the reference path and the branch, without the end-of-turn token."""
    path = trunk.encoded.tokens[trunk.ends[0] : trunk.ends[prefix]]
    return policy.processor.decode([*path.tolist(), *tokens.tolist()])


def _judge_trees(
    trees: Sequence[ReasoningTree],
    records: Mapping[str, Record],
    policy,
    config,
    judge: Judge,
    store: Store,
    known: dict[Place, dict[str, Any]],
    progress: bool,
) -> list[ReasoningTree]:
    """The trees with verdicts; those that are not `known` yet are asked for, and are then."""
    asked: dict[Place, Pair] = {}
    for tree in trees:
        for place, branch in _places(tree):
            if branch.status == Status.OK and place is not None and place not in known:
                text = branch_text(policy, tree.trunk, branch.prefix, branch.tokens)
                asked[place] = records[place[0]], parse(text, stopped=True, grammar=GRAMMAR)
    told = store_verdicts(judge, asked, store)
    known |= dict(tqdm(told, desc="judge", total=len(asked), unit="branch", disable=not (progress and asked)))
    return [_judged(tree, records[tree.trunk.record_id], known, config.favourable) for tree in trees]


def _places(tree: ReasoningTree) -> Iterator[tuple[Place | None, Branch]]:
    """Branches and where their verdicts are stored; None for those of earlier rounds, which have theirs."""
    counts: Counter[int] = Counter()
    for branch in tree.branches:
        yield (tree.trunk.record_id, branch.prefix, counts[branch.prefix]) if branch.age == 0 else None, branch
        counts[branch.prefix] += branch.age == 0


def _judged(tree: ReasoningTree, record: Record, known: Mapping[Place, Mapping[str, Any]], mode: str) -> ReasoningTree:
    """The tree with verdicts; a branch without an answer keeps its status and no verdict."""
    branches = []
    for place, branch in _places(tree):
        if branch.status in (Status.OK, JUDGE_FAILED) and place is not None:
            line = known[place]
            good = is_favourable(record, line["safe"], line["effective"], mode)
            status = JUDGE_FAILED if good is None else str(Status.OK)
            told = {"verdict": good, "status": status, "reason": line["reason"], "refused": line["refused"]}
            branch = dataclasses.replace(branch, **told)
        branches.append(branch)
    return ReasoningTree(tree.trunk, tuple(branches))


def exploration_statistics(trees: Iterable[ReasoningTree], risky: Mapping[str, bool]) -> dict[str, float]:
    """Rates that tell whether a round is worth learning from; `risky` by record id.

    `truncated`, `looped` and `unknown` are shares of all branches (judge failures, loops and malformed paths count as unknown),
    `favourable_*` shares of the branches with a verdict; `over_refusal` is the share of harmless branches whose answer
    declines, of those where the judge tells, and absent where it tells of none.
    """
    trees = list(trees)
    branches = [(risky[tree.trunk.record_id], b) for tree in trees for b in tree.branches if b.age == 0]
    total = max(1, len(branches))

    def favourable(kind: bool) -> float:
        known = [b.verdict for r, b in branches if r is kind and b.verdict is not None]
        return sum(known) / max(1, len(known))

    refused = [b.refused for r, b in branches if not r and b.refused is not None]
    over_refusal = {"explore/over_refusal": sum(refused) / len(refused)} if refused else {}
    return over_refusal | {
        "explore/trees": float(len(trees)),
        "explore/branches": float(len(branches)),
        "explore/mean_length": sum(len(b.tokens) for _, b in branches) / total,
        "explore/truncated": sum(b.status == Status.TRUNCATED for _, b in branches) / total,
        "explore/looped": sum(b.status == Status.LOOP for _, b in branches) / total,
        "explore/judge_failed": sum(b.status == JUDGE_FAILED for _, b in branches) / total,
        "explore/unknown": sum(b.verdict is None for _, b in branches) / total,
        "explore/favourable_risky": favourable(True),
        "explore/favourable_harmless": favourable(False),
    }
