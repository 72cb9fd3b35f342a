"""Writes the policy of a training run as a Hugging Face folder that transformers loads.

python scripts/export.py --checkpoint=runs/srpo --output=runs/srpo-hf [--step=64] [--dtype=bfloat16]
"""

import jax.numpy as jnp
from absl import flags

from srpo_jax import cli, distributed
from srpo_jax.runs import load_run
from srpo_jax.sharding import local_copy

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Work directory of the run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights in the file.")


def main(_):
    policy, step = load_run(CHECKPOINT.value, STEP.value)
    params = local_copy(policy.params)
    distributed.on_lead(lambda: policy.save(OUTPUT.value, params, dtype=jnp.dtype(DTYPE.value)))
    cli.say(f"wrote step {step} of {CHECKPOINT.value} to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
