"""Compiles an update and decoding for eight simulated devices; prints as JSON which collectives they run how often.

python tests/traffic.py DATAxFSDPxTENSOR ...
"""

from __future__ import annotations

import json
import sys

import jax

from srpo_jax.preflight import programs
from srpo_jax.preflight.report import collective_runs
from srpo_jax.preflight.slices import Slice
from srpo_jax.recipes import released
from srpo_jax.sharding import AXES, flatten


def main(meshes: list[str]) -> None:
    for name in meshes:
        config = released("3B", "full,runlocal")
        config.mesh.update(dict(zip(AXES, map(int, name.split("x")), strict=True)))
        config.compute.logprob_chunk = 128
        here = Slice("cpu", "v5e:1x1", jax.devices(), 2**34)
        setting = programs.Setting.of(config, here.mesh(**config.mesh))
        told = {"mesh": name, "params": {path: list(x.shape) for path, x in flatten(setting.params).items()}}
        update, explore = programs.update_program(setting, here.chip), programs.explore_programs(setting, here.chip)[0]
        for program in (update, explore):
            runs = collective_runs(program.lower().compile().as_text())
            told[program.name] = [[kind, list(results), times] for (kind, results), times in sorted(runs.items())]
        told["width"] = setting.run.explore.trees // 8, programs.STEPS * setting.run.explore.k
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
