"""Writes the policy of a training run as a Hugging Face folder that transformers loads, or its adapters as one for PEFT.

python scripts/export.py --checkpoint=runs/srpo --output=runs/srpo-hf [--step=64] [--dtype=bfloat16] [--adapter]

A whole policy has its adapters merged into the kernels and quantised kernels in floating point again. Safety heads that trained
beside it (`loss.weights.safety_heads`) are no part of it: they stay in the run's checkpoints.
"""

import jax.numpy as jnp
from absl import app, flags

from srpo_jax import cli
from srpo_jax.models.peft import save_adapters
from srpo_jax.runs import adapter_base, load_run

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Work directory of the run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder or address to write.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights in the file.")
ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's format.")
BASE = flags.DEFINE_string(
    "base", None, "What adapters name as their base; default: the folder that the run started from."
)


def main(_):
    if BASE.value and not ADAPTER.value:
        raise app.UsageError("--base is for --adapter: a whole policy has no base")
    policy, step = load_run(CHECKPOINT.value, STEP.value)
    dtype = jnp.dtype(DTYPE.value)
    if ADAPTER.value:
        base = adapter_base(CHECKPOINT.value, policy.params)  # refuses a run that trained more
        save_adapters(OUTPUT.value, policy.config, policy.params, BASE.value or base, dtype)
    else:
        policy.save(OUTPUT.value, dtype=dtype)
    cli.say(f"wrote {'the adapters of ' * ADAPTER.value}step {step} of {CHECKPOINT.value} to {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
