"""Runs exploration, evaluation and an update on several meshes of simulated devices; prints what came out as JSON.

python tests/meshes.py CHECKPOINT DATAxFSDPxTENSOR ...
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import jax
import numpy as np

from srpo_jax import sharding
from srpo_jax.data import scenes
from srpo_jax.evaluation.generate import GenerateConfig, encode_prompts, generate
from srpo_jax.exploration.explorer import ExploreConfig, explore_shape
from srpo_jax.exploration.sampler import branch_keys, record_key
from srpo_jax.exploration.scheduler import Request, sample
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.models.policy import Policy, load_policy
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, init_state
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, pack_trees

TREES, K = 16, 2
EXPLORE = ExploreConfig(k=K, max_tokens=12, trees=8, width=8, prefill=2, trunk=(144,), patches=(16,))
PROMPTS = GenerateConfig(temperature=1.0, samples=2, max_tokens=12, batch=8, prefill=2, trunk=(96,), patches=(16,))
LOSS = LossConfig({"srpo": 1.0, "key_sentence": 0.2, "safety_heads": 0.2})  # all that an update can be asked for
PACK = PackConfig((192,), (160,), (32,), 16, (12,), (12,), (16,), extras=LOSS.extras())


def explored(policy: Policy, trunks, gather: bool) -> dict:
    """Tokens, log-probs and near-ties of every branch."""
    config = dataclasses.replace(EXPLORE, gather=gather)
    prefixes = np.repeat(np.arange(6, dtype=np.int32), K)
    numbers = np.arange(len(prefixes), dtype=np.int32) % K
    requests = [
        Request(
            t.encoded,
            np.asarray(t.ends[:-1], np.int32),
            prefixes,
            branch_keys(record_key(jax.random.key(0), t.record_id), prefixes, numbers),
        )
        for t in trunks
    ]
    shape = explore_shape(policy, trunks, config)
    found = dict(sample(policy, policy.params, requests, shape, config.sampling(policy.processor.stop_ids)))
    fields = ("tokens", "logprobs", "lengths", "ties")
    return {name: [getattr(found[i], name).tolist() for i in range(len(trunks))] for name in fields}


def answered(policy: Policy, prompts) -> dict:
    """Tokens and near-ties of every response."""
    responses = generate(policy, policy.params, prompts, PROMPTS, progress=False)
    return {"tokens": [r.tokens.tolist() for r in responses], "ties": [r.gap for r in responses]}


def updated(policy: Policy, trunks, mesh) -> dict:
    """Loss, norms and digests of policy and safety heads after two updates on the same fixed trees."""
    rng = np.random.default_rng(0)
    trees = []
    for trunk in trunks[:8]:
        tokens = [rng.integers(5, 200, rng.integers(2, 12)).astype(np.int32) for _ in range(12)]
        made = (Branch(i // 2, t, np.zeros(len(t), np.float32), "ok", bool(i % 2)) for i, t in enumerate(tokens))
        trees.append(ReasoningTree(trunk, tuple(made)))
    packed, _ = pack_trees(trees, PACK, buffers=8)
    batches = sharding.place_batch(jax.tree.map(lambda x: np.asarray(x)[None], packed), mesh)
    optimizer = OptimConfig(learning_rate=1e-2, steps=4).make()
    own = LOSS.parameters(policy.config.text.hidden_size)
    state = init_state(policy.params, optimizer, (".",), mesh, own=own)
    update = make_update(policy.graphdef, optimizer, LOSS, ComputeConfig(), mesh, state)
    told = []
    for _ in range(2):
        state, metrics = update(state, batches)
        told.append({name: float(x) for name, x in metrics.items()})
    digest = {name: np.asarray(state.params[name]).ravel()[:64].tolist() for name in ("head", "heads/full/kernel")}
    return {"metrics": told, "parameters": digest}


def main(folder: str, meshes: list[str]) -> None:
    records = scenes.records("train", TREES)
    for name in meshes:
        sizes = [int(n) for n in name.split("x")]
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        policy = load_policy(folder)
        placed = jax.device_put(policy.params, sharding.param_shardings(policy.params, mesh))
        policy = dataclasses.replace(policy, params=placed)
        trunks = [make_trunk(record, policy.processor) for record in records]
        told = {"mesh": name, "explore": explored(policy, trunks, False), "gathered": explored(policy, trunks, True)}
        told["evaluate"] = answered(policy, encode_prompts(records, policy.processor))
        told["update"] = updated(policy, trunks, mesh)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
