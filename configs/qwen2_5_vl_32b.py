"""Aligns Qwen2.5-VL-32B on your own records; adapters by default, `:full` moves the whole decoder.

    python scripts/train.py --config=configs/qwen2_5_vl_32b.py:lora --workdir=runs/srpo_32b --config.judge=my_judge:judge \
        --config.policy.path=/models/Qwen2.5-VL-32B-Instruct --config.data.path=/data/records.jsonl \
        --config.batch.trees=64 --config.explore.trees=64
    python tpu/preflight.py --config=configs/qwen2_5_vl_32b.py:lora --topology=v5e-64 --config.batch.trees=64 \
        --config.explore.trees=64 --config.eval.batch=64

On v5e-64, one question per chip (a trunk of at most 2,048 tokens with 4,096 patches, 24 branches of at most 512), an update
cannot take less than 9.81 s for `lora` and 14.39 s for `full`. Parameters, optimizer and the loaded policy
take 2.44 and 6.71 GiB of a chip, by formula.
Neither was compiled yet. See docs/preflight.md.

`:lora,runlocal` and `:full,runlocal` run the same on a laptop, small (see srpo_jax/recipes.py).
"""

from srpo_jax.recipes import released


def get_config(variant: str = "lora"):
    return released("32B", variant)
