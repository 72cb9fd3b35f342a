"""What some objectives need to know of branches beyond their verdict: log-probs under a reference model, the end of a
step.

Reference log-probs are computed once per tree with the engine of the update, under the parameters that the run started
from, and kept beside the trees; a killed run computes the missing ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from srpo_jax import distributed
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.files import Store
from srpo_jax.models.fingerprint import input_fingerprint, params_fingerprint
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor
from srpo_jax.models.quantize import compute_params
from srpo_jax.models.scoring import score_trees
from srpo_jax.training.step import ComputeConfig
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, usable_branches

REFERENCE = "reference.jsonl"


def annotate(
    trees: Sequence[ReasoningTree],
    policy: Policy,
    pack: PackConfig,
    compute: ComputeConfig,
    batch: int,
    folder: str | Path | None = None,
) -> list[ReasoningTree]:
    """The trees with what `pack.extras` asks of their branches; reference log-probs that they have are kept.

    Args:
      trees: explored and judged.
      policy: the reference model, which is the policy before training, and its processor.
      pack: shapes and extras.
      compute: how the update computes; the reference model computes the same way.
      batch: trees scored together, a multiple of the data × fsdp devices of the mesh.
      folder: where `reference.jsonl` is kept and resumed from; None keeps nothing.
    """
    trees = list(trees)
    if "step_lengths" in pack.extras:
        trees = [with_steps(tree, policy.processor) for tree in trees]
    if "reference" in pack.extras and any(b.reference is None for t in trees for b in usable_branches(t, pack)[0]):
        trees = with_reference(trees, policy, pack, compute, batch, folder)
    return trees


def with_steps(tree: ReasoningTree, processor: Processor) -> ReasoningTree:
    """The tree with the length of every branch's first own step."""
    branches = tuple(dataclasses.replace(b, step=step_length(b.tokens, processor)) for b in tree.branches)
    return dataclasses.replace(tree, branches=branches)


def step_length(tokens: np.ndarray, processor: Processor) -> int:
    """Tokens of the first step that a branch writes: up to the next heading or the closing tag, or all if there is
    neither."""
    text = processor.decode(tokens.tolist())
    headings = [match.start() for match in GRAMMAR.heading.finditer(text)]
    closing = text.find(GRAMMAR.closing_tag)
    ends = [*headings[1:2], *([closing] if closing >= 0 else [])]
    if not ends:
        return len(tokens)
    # The longest opening of the tokens whose text ends before it; one token at least, so that a step is never empty.
    fits = bisect.bisect_right(
        range(len(tokens) + 1), min(ends), key=lambda n: len(processor.decode(tokens[:n].tolist()))
    )
    return max(1, fits - 1)


def with_reference(
    trees: Sequence[ReasoningTree],
    policy: Policy,
    pack: PackConfig,
    compute: ComputeConfig,
    batch: int,
    folder: str | Path | None = None,
) -> list[ReasoningTree]:
    """The trees with log-probs of their usable branches under `policy`; see `annotate`.

    Of several processes all score the same trees together, and the lead process writes down the log-probs.
    """
    params = compute_params(policy.params, compute.dtype)
    pack = dataclasses.replace(pack, extras=())
    name = params_fingerprint(params)
    with Store.open(folder, REFERENCE) as store:
        known = {line["tree"]: line for line in store.lines if line["parameters"] == name}
        missing = [tree for tree in trees if _key(tree, pack) not in known]
        distributed.barrier()  # what the lead appends from here on, nobody has read
        bar = tqdm(total=len(missing), desc="reference", unit="tree", disable=not missing or not distributed.is_lead())
        usable = [dataclasses.replace(tree, branches=tuple(usable_branches(tree, pack)[0])) for tree in missing]
        options: dict[str, Any] = {"chunk": compute.logprob_chunk, "attention": compute.attention}
        for tree, told in zip(
            missing, score_trees(policy.graphdef, params, usable, pack, batch, **options), strict=True
        ):
            line = {"record_id": tree.trunk.record_id, "tree": _key(tree, pack), "parameters": name}
            known[line["tree"]] = line | {"logprobs": [x.tolist() for x in told]}
            if distributed.is_lead():
                store.append(known[line["tree"]])
            bar.update()
        bar.close()
    return [_told(tree, known[_key(tree, pack)], pack) for tree in trees]


def _key(tree: ReasoningTree, pack: PackConfig) -> str:
    """What a tree's reference log-probs depend on beside the parameters."""
    digest = hashlib.sha256(f"{input_fingerprint(tree.trunk.encoded)} {tree.trunk.ends} ".encode())
    for branch in usable_branches(tree, pack)[0]:
        digest.update(f"{branch.prefix} {len(branch.tokens)} ".encode() + branch.tokens.tobytes())
    return digest.hexdigest()[:16]


def _told(tree: ReasoningTree, line: Mapping[str, Any], pack: PackConfig) -> ReasoningTree:
    usable, _, _ = usable_branches(tree, pack)
    told = {_same(b): np.asarray(x, np.float32) for b, x in zip(usable, line["logprobs"], strict=True)}
    branches = tuple(dataclasses.replace(b, reference=told.get(_same(b))) for b in tree.branches)
    return dataclasses.replace(tree, branches=branches)


def _same(branch: Branch) -> tuple[int, bytes]:
    return branch.prefix, branch.tokens.tobytes()
