"""Aligns Qwen2.5-VL-7B on your own records; adapters by default, `:full` moves the whole decoder.

    python scripts/train.py --config=configs/qwen2_5_vl_7b.py:lora --workdir=runs/srpo_7b --config.judge=my_judge:judge \
        --config.policy.path=/models/Qwen2.5-VL-7B-Instruct --config.data.path=/data/records.jsonl \
        --config.batch.trees=16 --config.explore.trees=16
    python tpu/preflight.py --config=configs/qwen2_5_vl_7b.py:lora --topology=v5e-16 --config.batch.trees=16 \
        --config.explore.trees=16 --config.eval.batch=16

On v5e-16, one question per chip (a trunk of at most 2,048 tokens with 4,096 patches, 24 branches of at most 512), an update
cannot take less than 2.23 s for `lora` and 3.23 s for `full`. Parameters, optimizer and the loaded policy
take 1.41 and 6.29 GiB of a chip, by formula.
`full` compiled: 18.3 of 15.75 GiB, so it does not fit; `lora` was not compiled. See docs/preflight.md.

`:lora,runlocal` and `:full,runlocal` run the same on a laptop, small (see srpo_jax/recipes.py).
"""

from srpo_jax.recipes import released


def get_config(variant: str = "lora"):
    return released("7B", variant)
