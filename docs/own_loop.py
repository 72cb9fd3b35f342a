"""Reasoning trees and losses in somebody else's training loop: SRPO with a pinch of DPO in 40 lines of plain JAX and optax.

python docs/own_loop.py [updates]

Of the library it takes trees, their packing, log-probs and losses; the loop, the optimizer and the mixture are your own.
The policy explores once, and the reference model of DPO is the policy as it was then.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import srpo_jax as sx
from srpo_jax.config import policy_path
from srpo_jax.data import scenes
from srpo_jax.judges import rules
from srpo_jax.models.scoring import tree_logprobs

policy = sx.load_policy(policy_path("embedded"))
explore = sx.ExploreConfig(k=4, max_tokens=100, trees=8, trunk=(144,), patches=(64,))
trees = sx.explore(policy, policy.params, scenes.records("train", 8), explore, rules.judge, jax.random.key(0))
batch = jax.tree.map(jnp.asarray, sx.pack(trees, policy))
before = jax.jit(lambda params: tree_logprobs(nnx.merge(policy.graphdef, params), batch))(policy.params)[1]


def loss(params):
    path, branch = tree_logprobs(nnx.merge(policy.graphdef, params), batch)
    branches = sx.losses.BranchLogprobs(branch, batch.lengths, batch.prefixes, batch.pairs, reference=before)
    srpo, told = sx.losses.srpo(path, batch.path_lengths, branches, lambda_=0.3)
    dpo, _ = sx.losses.dpo(branches, beta=0.1)
    return jnp.mean(srpo + 0.1 * dpo), told


optimizer = optax.adamw(2e-4)
params, state = policy.params, optimizer.init(policy.params)


@jax.jit
def update(params, state):
    (value, told), grads = jax.value_and_grad(loss, has_aux=True)(params)
    step, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, step), state, value, jnp.mean(told["pair_accuracy"])


for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
    params, state, value, accuracy = update(params, state)
    print(f"update {number}: loss {value:.4f}, favourable branch more likely in {accuracy:.0%} of pairs")
