"""Aligns Qwen2.5-VL-32B on your own records; adapters by default, `:full` moves the whole decoder.

    python scripts/train.py --config=configs/qwen2_5_vl_32b.py:lora --workdir=runs/srpo_32b --config.judge=my_judge:judge \
        --config.policy.path=/models/Qwen2.5-VL-32B-Instruct --config.data.path=/data/records.jsonl
    python tpu/preflight.py --config=configs/qwen2_5_vl_32b.py:lora --topology=v5e-8

`:lora,runlocal` and `:full,runlocal` run the same on a laptop in a minute, small (see srpo_jax/recipes.py).
"""

from srpo_jax.recipes import released


def get_config(variant: str = "lora"):
    return released("32B", variant)
