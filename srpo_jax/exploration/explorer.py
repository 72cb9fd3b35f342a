"""From records to judged trees: sample, judge, join; each step resumable on its own.

A folder of exploration holds two append-only files. `branches.jsonl` has one line per tree as it comes off the device,
`verdicts.jsonl` one line per judged branch. A killed run reads what is there and goes on; nothing is sampled or asked twice.
In a job of several processes each explores whole batches of the records and has files of its own; all read all of them.
`round.json` says what the branches depend on: they are never taken for those of other parameters, settings or records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from srpo_jax import distributed, observe
from srpo_jax.data.records import Record
from srpo_jax.exploration.engine import EngineShape, Samples
from srpo_jax.exploration.judging import Judge, Pair, Place, known_verdicts, store_verdicts
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.files import Store, write_json
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.fingerprint import input_fingerprint, params_fingerprint
from srpo_jax.models.policy import Policy
from srpo_jax.paths import Status, parse
from srpo_jax.trees import Branch, Ladder, ReasoningTree, Trunk, bucket

JUDGE_FAILED = "judge_failed"
ROUND_FILE = "round.json"


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """How trees are explored.

    Attributes:
      k: branches per prefix.
      prefixes: the prefixes that are continued, ascending; None for all. `(0,)` samples `k` whole responses from the root.
      temperature: of sampling; further options of a draw as in `sampler.SampleConfig`.
      max_tokens: token budget of a branch.
      trees: trees that decode together; on a mesh a multiple of its data × fsdp devices.
      width: branches of a tree that decode together; 0 for all. The others wait for a place, so that few places idle
        while the last branches of a tree end.
      prefill: trunks that are prefilled together, per device of data × fsdp.
      trunk: ladder of trunk lengths T; all trunks of a round are kept at the length of the longest.
      patches: ladder of vision patches per tree; None takes the largest of the round.
      int8_cache: keep keys and values as int8, half the memory of bfloat16; log-probs move (docs/performance.md).
      favourable: "safe_and_effective", or "safe" alone. A harmless record's branch is favourable iff it is effective.
    """

    k: int = 4
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
    int8_cache: bool = False
    favourable: str = "safe_and_effective"

    def __post_init__(self):
        if self.favourable not in ("safe_and_effective", "safe"):
            raise ValueError(f"favourable={self.favourable!r}: use 'safe_and_effective' or 'safe'")
        if self.prefixes is not None and (
            not self.prefixes or list(self.prefixes) != sorted(set(self.prefixes)) or not self.prefixes[0] >= 0
        ):
            raise ValueError(f"prefixes={self.prefixes}: give at least one, from 0 on, ascending; or None for all")
        self.sampling(())

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
) -> list[ReasoningTree]:
    """Explores `k` continuations of every proper prefix of every record's path and judges them.

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
    branches, verdicts = Store.open(folder, "branches.jsonl"), Store.open(folder, "verdicts.jsonl")
    with branches, verdicts:
        stored = {line["record_id"]: line for line in branches.lines}
        if params is None and (missing := by_id.keys() - stored.keys()):
            raise ValueError(
                f"{folder} lacks the trees of {len(missing)} records ({sorted(missing)[:3]}), and the parameters that explored "
                "it have been updated since; restore branches.jsonl or start a new work directory"
            )
        if folder is not None:
            origin = _origin(params, trunks, config, key, round_)
            empty = not stored and not verdicts.lines
            distributed.on_lead(lambda: _claim(Path(folder) / ROUND_FILE, origin, empty=empty))
        own, quiet = distributed.mine(trunks), not (progress and distributed.is_lead())
        shape, round_key = explore_shape(policy, trunks, config), jax.random.fold_in(key, round_)
        with observe.span("explore"):
            title = f"explore round {round_}"
            trees = _sampled(policy, params, own, config, round_key, shape, stored, branches, title, quiet, features)
        with observe.span("judge"):
            # Once updates have learned from a round, its verdicts stay as they are, failed ones, too.
            trees = _judge_trees(trees, by_id, policy, config, judge, verdicts, not quiet, again=params is not None)
        if distributed.process_count() == 1:
            return trees
        stored, _ = {line["record_id"]: line for line in branches.share()}, verdicts.share()
        trees = [ReasoningTree.from_json(stored[trunk.record_id], trunk) for trunk in trunks]
        # All of them are judged by now.
        return _judge_trees(trees, by_id, policy, config, judge, verdicts, progress=False, again=False)


def _check_trunks(trunks: Sequence[Trunk], config: ExploreConfig) -> None:
    """Raises ValueError for one that no bucket holds."""
    for trunk in trunks:
        bucket(_length(trunk, config), config.trunk, f"record {trunk.record_id!r}: trunk tokens (explore.trunk)")
        patches = trunk.encoded.patches
        bucket(patches, config.patches or (patches,), f"record {trunk.record_id!r}: explore.patches")


def _origin(params, trunks: Sequence[Trunk], config: ExploreConfig, key: jax.Array, round_: int) -> dict[str, Any]:
    """All that the branches of a round depend on, as JSON gives it back; `favourable` is applied afterwards."""
    settings = {f"explore.{name}": value for name, value in dataclasses.asdict(config).items() if name != "favourable"}
    records = {trunk.record_id: _trunk_fingerprint(trunk) for trunk in trunks}
    origin = {"round": round_, "key": np.ravel(jax.random.key_data(key)).tolist(), **settings, "records": records}
    if params is not None:
        origin["parameters"] = params_fingerprint(params)
    return json.loads(json.dumps(origin))


def _trunk_fingerprint(trunk: Trunk) -> str:
    return hashlib.sha256(f"{input_fingerprint(trunk.encoded)} {trunk.ends}".encode()).hexdigest()[:16]


def _claim(file: Path, origin: dict[str, Any], empty: bool) -> None:
    """Writes what a round depends on before its first tree; ValueError where what is there depends on something else."""
    if empty:
        write_json(file, origin)
        return
    if not file.exists():
        raise ValueError(f"{file.parent} has no {file.name}, which tells what was explored; use another work directory")
    found = json.loads(file.read_text(encoding="utf-8"))
    theirs, ours = found.pop("records"), origin.pop("records")
    lines = [f"{name} is {origin[name]}, there {found.get(name)}" for name in origin if origin[name] != found.get(name)]
    if others := sorted(theirs.keys() ^ ours.keys()):
        lines.append(f"it holds trees of other records ({len(others)} differ: {', '.join(others[:3])})")
    if changed := sorted(name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]):
        names = f"{len(changed)} records ({', '.join(changed[:3])})"
        lines.append(f"{names} give another trunk now: question, image, path, grammar or tokenizer changed")
    if lines:
        raise ValueError(
            f"{file.parent} was explored from something else: {'; '.join(lines)}; use another work directory"
        )


def _sampled(
    policy, params, trunks, config: ExploreConfig, key, shape: EngineShape, stored, store: Store, title, quiet, features
) -> list[ReasoningTree]:
    """A tree of every trunk, in order: those stored, and the others as they come off the device."""
    found = {t.record_id: ReasoningTree.from_json(stored[t.record_id], t) for t in trunks if t.record_id in stored}
    missing = [trunk for trunk in trunks if trunk.record_id not in found]
    with tqdm(total=len(trunks), initial=len(found), desc=title, unit="tree", disable=quiet) as bar:
        if params is not None:
            for tree in sample_trees(policy, params, missing, config, key, shape, features):
                found[tree.trunk.record_id] = tree
                store.append(tree.to_json())
                bar.update()
    return [found[trunk.record_id] for trunk in trunks]


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
    """Unjudged trees of the trunks, as they finish; `key` is that of the round, `shape` from `explore_shape`."""
    taken: list[Trunk] = []

    def requests() -> Iterator[Request]:
        for trunk in trunks:
            taken.append(trunk)
            chosen = config.prefixes_of(trunk)
            places, numbers = (x.astype(np.int32) for x in np.divmod(np.arange(len(chosen) * config.k), config.k))
            keys = branch_keys(record_key(key, trunk.record_id), chosen[places], numbers)
            yield Request(trunk.encoded, np.asarray(trunk.ends, np.int32)[chosen], places, keys)

    how = config.sampling(policy.processor.stop_ids)
    for number, samples in sample(policy, params, requests(), shape, how, features):
        trunk = taken[number]
        prefixes = np.repeat(config.prefixes_of(trunk), config.k)
        ones = [jax.tree.map(lambda x, m=m: x[m], samples) for m in range(len(prefixes))]
        yield ReasoningTree(
            trunk, tuple(_branch(policy, trunk, int(i), x) for i, x in zip(prefixes, ones, strict=True))
        )


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
    progress: bool,
    again: bool,
) -> list[ReasoningTree]:
    """The trees with verdicts, those of the store not asked again; failed ones are if `again`."""
    known = known_verdicts(judge, store, failed=not again)
    asked: dict[Place, Pair] = {}
    for tree in trees:
        for place, branch in _places(tree):
            if branch.status == Status.OK and place not in known:
                text = branch_text(policy, tree.trunk, branch.prefix, branch.tokens)
                asked[place] = records[place[0]], parse(text, stopped=True, grammar=GRAMMAR)
    told = store_verdicts(judge, asked, store)
    known |= dict(tqdm(told, desc="judge", total=len(asked), unit="branch", disable=not progress))
    return [_judged(tree, records[tree.trunk.record_id], known, config.favourable) for tree in trees]


def _places(tree: ReasoningTree) -> Iterator[tuple[Place, Branch]]:
    counts: Counter[int] = Counter()
    for branch in tree.branches:
        yield (tree.trunk.record_id, branch.prefix, counts[branch.prefix]), branch
        counts[branch.prefix] += 1


def _judged(tree: ReasoningTree, record: Record, known: Mapping[Place, Mapping[str, Any]], mode: str) -> ReasoningTree:
    """The tree with verdicts; a branch without an answer keeps its status and no verdict."""
    branches = []
    for place, branch in _places(tree):
        if branch.status == Status.OK:
            line = known[place]
            good = is_favourable(record, line["safe"], line["effective"], mode)
            status = JUDGE_FAILED if good is None else branch.status
            told = {"verdict": good, "status": status, "reason": line["reason"], "refused": line["refused"]}
            branch = dataclasses.replace(branch, **told)
        branches.append(branch)
    return ReasoningTree(tree.trunk, tuple(branches))


def is_favourable(
    record: Record, safe: bool | None, effective: bool | None, mode: str = "safe_and_effective"
) -> bool | None:
    """Whether an answer is favourable; None if the judge's unknowns leave it open.

    On a risky record it must be safe and, unless `mode` is "safe", effective: redirect and help. On a harmless record it
    must be effective: a needless refusal is unfavourable.
    """
    wanted: tuple[bool | None, ...] = (effective,)
    if record.risky:
        wanted = (safe,) if mode == "safe" else (safe, effective)
    if any(x is False for x in wanted):
        return False
    return None if any(x is None for x in wanted) else True


def exploration_statistics(trees: Iterable[ReasoningTree], risky: Mapping[str, bool]) -> dict[str, float]:
    """Rates that tell whether a round is worth learning from; `risky` by record id.

    `truncated`, `looped` and `unknown` are shares of all branches (judge failures, loops and malformed paths count as unknown),
    `favourable_*` shares of the branches with a verdict; `over_refusal` is the share of harmless branches whose answer
    declines, of those where the judge tells, and absent where it tells of none.
    """
    trees = list(trees)
    branches = [(risky[tree.trunk.record_id], b) for tree in trees for b in tree.branches]
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
