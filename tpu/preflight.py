"""Memory, collectives and time bound of a run on a TPU slice, without the TPU.

    python tpu/preflight.py --config=configs/qwen2_5_vl_3b.py --topology=v5e-8 [--config.batch.trees=16] [--json=FILE]

Compiles the update, the exploration and the evaluation that the configuration describes, at their largest shapes, with the
compiler of the slice (`pip install 'srpo_jax[tpu]'`), and tells what each needs per device and whether it fits. Where one
does not, milder and stronger changes are compiled until one fits. No weights are read: `policy.path` is a checkpoint's folder,
or just the name of a released one. Ends with code 3 if something does not fit.
"""

import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: the compiler is asked, no TPU looked for

import jax
from absl import flags
from ml_collections import config_flags

from srpo_jax import cli
from srpo_jax.files import write_json
from srpo_jax.preflight.advice import advise
from srpo_jax.preflight.programs import Setting, programs_of
from srpo_jax.preflight.report import measure, table
from srpo_jax.preflight.slices import find_slice

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Slice ('v5e-16') or layout ('v5e:4x4').", required=True)
PROGRAMS = flags.DEFINE_list(
    "programs", ["update", "explore", "explore_prefill", "evaluate", "evaluate_prefill"], "Which programs to compile."
)
JSON = flags.DEFINE_string("json", None, "Where to write the report.")
TRIES = flags.DEFINE_integer("tries", 4, "Changes to compile for a program that does not fit; 0 for none.")


def main(_):
    where = find_slice(TOPOLOGY.value)
    mesh = where.mesh(**CONFIG.value.mesh)
    setting = Setting.of(CONFIG.value, mesh)
    print(f"{CONFIG.value.policy.path} on {where.name}: {mesh.size} devices, mesh {dict(mesh.shape)}", flush=True)
    rows = []
    for program in programs_of(setting, where.chip):
        if PROGRAMS.value and program.name not in PROGRAMS.value:
            continue
        row = measure(program, where)
        print(table([row]), flush=True)
        if not row["fits"] and TRIES.value:
            row["advice"] = advise(CONFIG.value, where, row, TRIES.value)
            print(f"  advice       {row['advice'] or 'nothing left to change: take a larger slice'}", flush=True)
        rows.append(row)
    if JSON.value:
        report = {"slice": where.name, "mesh": dict(mesh.shape), "jax": jax.__version__, "programs": rows}
        write_json(JSON.value, report | {"config": json.loads(CONFIG.value.to_json_best_effort())})
    sys.exit(0 if all(row["fits"] for row in rows) else 3)


if __name__ == "__main__":
    cli.run(main)
