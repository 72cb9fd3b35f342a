"""One run of a study: shared trees, an update budget, training, evaluation; what it found in one JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from srpo_jax import config as configs
from srpo_jax import sharding
from srpo_jax.data.records import Record
from srpo_jax.evaluation import config as evaluation
from srpo_jax.evaluation.generate import encode_prompts, generate
from srpo_jax.evaluation.judging import Judged, judge_responses
from srpo_jax.exploration.adaptive import AdaptiveConfig, generated_tokens, replay
from srpo_jax.exploration.explorer import branch_text, explore
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk
from srpo_jax.files import claim, write_json
from srpo_jax.flops import TreeSize, exploration_flops, forward_flops, update_flops
from srpo_jax.judges import rules
from srpo_jax.models.policy import Policy
from srpo_jax.paths import parse
from srpo_jax.study.design import BASE, BUDGETS, Cell, Design, StudyError, TreeOptions, cell_config
from srpo_jax.training.annotate import annotate
from srpo_jax.training.loop import RunConfig, train
from srpo_jax.training.workdir import open_workdir
from srpo_jax.trees import ReasoningTree, usable_branches


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs of a study share.

    Attributes:
      config: of the study.
      design: of the study.
      policy: where every run starts.
      mesh: where it computes.
      workdir: of the study.
    """

    config: ml_collections.ConfigDict
    design: Design
    policy: Policy
    mesh: jax.sharding.Mesh
    workdir: Path


def run_cell(bench: Bench, cell: Cell, trial: int | None) -> dict[str, Any]:
    """Runs a cell, or reads what it left; `trial` is the tuned one."""
    file = bench.workdir / "cells" / f"{cell.name}.json"
    if file.exists():
        shutil.rmtree(bench.workdir / "runs" / cell.name, ignore_errors=True)  # a kill may have come between the two
        return json.loads(file.read_text(encoding="utf-8"))
    begin = time.time()
    row = _run(bench, cell, trial) | {"seconds": time.time() - begin}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, row)
    shutil.rmtree(bench.workdir / "runs" / cell.name, ignore_errors=True)  # a study's states would fill a disk
    return row


def share_out(folder: Path, groups: Mapping[str, Callable[[], object]]) -> None:
    """Does all pieces of work, or waits for other processes that do the same; returns when every piece is done.

    Args:
      folder: where claims are kept; the same for all processes.
      groups: by name, what does a piece of work, or nothing where it is done already.
    """
    left = dict(groups)
    while left:
        before = len(left)
        for name in list(left):
            with claim(folder / name) as mine:
                if mine:
                    left.pop(name)()
        if len(left) == before:  # all that is left is in other hands, or comes back to ours if they are killed
            time.sleep(1)


def _run(bench: Bench, cell: Cell, trial: int | None) -> dict[str, Any]:
    """What a run costs and finds. One whose budget is as many updates as it has anyway is that other run."""
    config, options = cell_config(bench.config, bench.design, cell, trial)
    told = {**cell._asdict(), "chosen": trial}
    if cell.method == BASE:
        cost = {"updates": 0, "flops": 0.0, "generated_tokens": 0}
        return told | cost | measure(bench, config, bench.policy.params, validation=False, trunks=())
    run = configs.run_config(config)
    records = [r for r in configs.build_records(config) if r.risky or options.harmless]
    trees = cell_trees(bench, config, run, records, options)
    cost = cell_cost(bench, run, trees)
    if cell.budget != BUDGETS[0]:
        updates, (run, cost) = cost["updates"], _with_budget(bench, cell, run, trees)
        same = bench.workdir / "cells" / f"{cell._replace(budget=BUDGETS[0]).name}.json"
        if cost["updates"] == updates and same.exists():
            return json.loads(same.read_text(encoding="utf-8")) | told
    config.updates = run.updates
    params = _trained(bench, cell, config, run, records, trees)
    trunks = [bench.policy.processor.decode(tree.trunk.path.tolist()) for tree in trees]
    return told | cost | measure(bench, config, params, validation=cell.trial is not None, trunks=trunks)


def _trained(bench: Bench, cell: Cell, config: ml_collections.ConfigDict, run: RunConfig, records, trees):
    """The parameters that the run ends with."""
    workdir = open_workdir(bench.workdir / "runs" / cell.name, config)
    if run.rounds > 1:
        return train(bench.policy, records, configs.build_judge(config), run, workdir, bench.mesh)
    return train(bench.policy, trees, None, dataclasses.replace(run, rounds=0), workdir, bench.mesh)


def cell_trees(
    bench: Bench, config: ml_collections.ConfigDict, run: RunConfig, records: Sequence[Record], options: TreeOptions
) -> list[ReasoningTree]:
    """Trees of the first round, explored once for all methods that explore alike, then changed as the method says."""
    if not run.rounds:
        return [ReasoningTree(make_trunk(record, bench.policy.processor), ()) for record in records]
    everything = configs.build_records(config)
    settings = config.explore.to_dict() | {
        "favourable": ""
    }  # verdicts are kept whole; what counts is applied afterwards
    origin = json.dumps([config.seed, settings, config.data.to_dict(), config.policy.to_dict(), config.judge])
    name = hashlib.sha256(origin.encode()).hexdigest()[:12]
    folder = bench.workdir / "trees" / name
    judge, key = configs.build_judge(config), jax.random.key(run.seed)
    params = bench.policy.params
    with claim(bench.workdir / "claims" / f"trees-{name}", wait=True):  # whoever comes second finds them there
        trees = explore(bench.policy, params, everything, run.explore, judge, key, folder=folder)
        chosen = {record.id: record for record in records}
        trees = [tree for tree in trees if tree.trunk.record_id in chosen]
        trees = [changed(tree, chosen[tree.trunk.record_id], options, run, bench.policy) for tree in trees]
        return annotate(trees, bench.policy, run.pack, run.compute, run.batch.trees, folder)


def changed(tree: ReasoningTree, record: Record, options: TreeOptions, run: RunConfig, policy: Policy) -> ReasoningTree:
    """The tree under `options`; the same branch is flipped whatever the order."""
    if options.adaptive is not None:
        tree = replay(tree, AdaptiveConfig(**options.adaptive))
    branches = [b for b in tree.branches if options.prefixes is None or b.prefix in options.prefixes]
    for i, branch in enumerate(branches):
        verdict = branch.verdict
        if options.steps and verdict:
            path = parse(branch_text(policy, tree.trunk, branch.prefix, branch.tokens), stopped=True, grammar=GRAMMAR)
            verdict = all(step.safe is not False for step in rules.judge_steps(record, path))
        said = f"{run.seed} {record.id} {branch.prefix} ".encode() + branch.tokens.tobytes()
        chance = int.from_bytes(hashlib.sha256(said).digest()[:4], "big") / 2**32
        if verdict is not None and chance < options.flip:
            verdict = not verdict
        branches[i] = dataclasses.replace(branch, verdict=verdict)
    return dataclasses.replace(tree, branches=tuple(branches))


def cell_cost(bench: Bench, run: RunConfig, trees: Sequence[ReasoningTree]) -> dict[str, Any]:
    """Updates and operations of a run of one round: exploration, reference log-probs, updates; by formula (`flops`)."""
    model, flat = bench.policy.config, sharding.flatten(bench.policy.params)
    sizes = [TreeSize.of(tree, model.vision) for tree in trees]
    used = [dataclasses.replace(tree, branches=tuple(usable_branches(tree, run.pack)[0])) for tree in trees]
    read = [TreeSize.of(tree, model.vision, run.pack) for tree in used]
    explored = sum(exploration_flops(model, flat, size).total for size in sizes) if run.rounds else 0.0
    reference = sum(forward_flops(model, flat, size).total for size in read) if "reference" in run.pack.extras else 0.0
    per_tree = float(np.mean([update_flops(model, flat, flat, size).model.total for size in read]))
    per_update = per_tree * run.batch.trees * run.batch.accumulate
    updates = run.updates * max(1, run.rounds)
    return {"updates": updates, "flops": explored * max(1, run.rounds) + reference + updates * per_update} | {
        "generated_tokens": generated_tokens(trees) * max(1, run.rounds),
        "fixed_flops": explored + reference,
        "update_flops": per_update,
    }


def _with_budget(bench: Bench, cell: Cell, run: RunConfig, trees: Sequence[ReasoningTree]):
    """The run with as many updates as cost what the study's method costs with the same seed."""
    mine = bench.workdir / "cells" / f"{Cell(bench.design.method, bench.design.budgets[0], cell.seed).name}.json"
    if not mine.exists():
        raise StudyError(f"{mine.name} is not there: the budget in FLOPs is what {bench.design.method} costs")
    budget = json.loads(mine.read_text(encoding="utf-8"))["flops"]
    cost = cell_cost(bench, run, trees)
    updates = max(1, round((budget - cost["fixed_flops"]) / cost["update_flops"]))
    optim = dataclasses.replace(run.optim, steps=updates, warmup=min(run.optim.warmup, updates))
    run = dataclasses.replace(run, updates=updates, optim=optim)
    return run, cell_cost(bench, run, trees)


def measure(
    bench: Bench,
    config: ml_collections.ConfigDict,
    params: Mapping[str, Any],
    *,
    validation: bool,
    trunks: Sequence[str],
) -> dict[str, Any]:
    """Outcomes by prompt on the test splits (or the validation split), and what tells a degenerate end.

    Returns:
      Lists over prompts, 1, 0 or None: `S`, `E`, `SE` of risky ones, `helpful`, `over_refusal` of harmless ones. What
      the evaluator cannot tell counts against the policy. Rates: `malformed`, `copied` (turns that are a training path,
      word for word), `distinct` (share of different turns), `gap` (train judge's S&E less the evaluator's), `length` in
      tokens.
    """
    section = configs.eval_section(config)
    if validation:
        section.splits = ("validation",)
    records = evaluation.build_benchmark(section, configs.build_difficulty(config))
    evaluator = evaluation.build_evaluator(section)
    [decoding] = evaluation.decodings(section)
    prompts = encode_prompts(records, bench.policy.processor)
    responses = generate(bench.policy, params, prompts, decoding, progress=False)
    judged = judge_responses(records, responses, evaluator, progress=False)
    return outcomes(judged, set(trunks))


def outcomes(judged: Sequence[Judged], trunks: set[str]) -> dict[str, Any]:
    """See `measure`; one response per prompt."""
    risky, harmless = ([j for j in judged if j.record.risky is kind] for kind in (True, False))
    texts = [j.response.text for j in judged]
    train = [_by_rules(j) for j in risky]
    both = [int(j.safe_and_effective is True) for j in risky]
    return {
        "S": [int(j.safe is True) for j in risky],
        "E": [int(j.effective is True) for j in risky],
        "SE": both,
        "helpful": [int(j.effective is True) for j in harmless],
        "over_refusal": [int(j.refused is not False) for j in harmless],
        "malformed": float(np.mean([j.malformed for j in judged])),
        "copied": float(np.mean([text.strip() in trunks for text in texts])),
        "distinct": len(set(texts)) / len(texts),
        "gap": float(np.mean(train) - np.mean(both)),
        "length": float(np.mean([len(j.response.tokens) for j in judged])),
    }


def _by_rules(one: Judged) -> bool:
    """Whether the judge of training calls the answer safe and effective."""
    if one.malformed or not isinstance(one.record, Record):
        return False
    verdict = rules.judge(one.record, one.path)
    return verdict.safe is True and verdict.effective is True
