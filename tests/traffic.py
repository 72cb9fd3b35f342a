"""Compiles an update and decoding for eight simulated devices; prints as JSON which collectives they run how often.

python tests/traffic.py DATAxFSDPxTENSOR ...
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from srpo_jax.models.logprobs import token_logprobs
from srpo_jax.preflight import programs
from srpo_jax.preflight.report import collective_runs
from srpo_jax.preflight.slices import Slice
from srpo_jax.recipes import released
from srpo_jax.sharding import AXES, batch_sharding, flatten, spec_of


def head_difference(mesh: jax.sharding.Mesh) -> float:
    """The largest difference that the mesh makes to log-probs and their gradients, in chunks of which the last is not full."""
    rng = np.random.default_rng(0)
    head, hidden = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 16), (8, 20, 16)))
    targets = rng.integers(-1, 64, (8, 20)).astype(np.int32)
    weights = rng.normal(size=(8, 20)).astype(np.float32)

    def scored(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.sum(weights * token_logprobs(hidden, head, targets, 8))

    both = jax.value_and_grad(scored, argnums=(0, 1))
    alone = both(head, hidden, targets)
    place = NamedSharding(mesh, spec_of("head", head.shape, mesh))
    batch = (jax.device_put(x, batch_sharding(mesh)) for x in (hidden, targets))
    with jax.set_mesh(mesh):
        split = jax.jit(both)(jax.device_put(head, place), *batch)
    pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def main(meshes: list[str]) -> None:
    for name in meshes:
        config = released("3B", "full,runlocal")
        config.mesh.update(dict(zip(AXES, map(int, name.split("x")), strict=True)))
        config.compute.logprob_chunk = 128
        here = Slice("cpu", "v5e:1x1", jax.devices(), 2**34)
        setting = programs.Setting.of(config, here.mesh(**config.mesh))
        told = {"mesh": name, "params": {path: list(x.shape) for path, x in flatten(setting.params).items()}}
        update, explore = programs.update_program(setting, here.chip), programs.explore_programs(setting, here.chip)[0]
        config.explore.gather = True
        gathered = programs.explore_programs(programs.Setting.of(config, setting.mesh), here.chip)[0]
        gathered = dataclasses.replace(gathered, name="explore gathered")
        for program in (update, explore, gathered):
            runs = collective_runs(program.lower().compile().as_text())
            told[program.name] = [[kind, list(results), times] for (kind, results), times in sorted(runs.items())]
        told["width"] = setting.run.explore.trees // 8, programs.STEPS * setting.run.explore.k
        told["difference"] = head_difference(setting.mesh)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
